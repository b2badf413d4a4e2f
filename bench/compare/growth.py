"""Commands on sparse guest memory of 1 GiB to 1 TiB that has the same data: what only the size costs."""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.compare.sparse import sparse_memfd
from bench.results import GIB, OURS, Results, Sample
from pyqmigrate.format.svg import Svg, nice_step
from pyqmigrate.vm import sync
from tests.harness.machine import BINARY, GuestRam, Qemu

__all__ = ["GROWTH_WORK", "SIZES", "draw_growth", "growth"]

GROWTH_WORK = "growth"
SIZES = (1, 4, 16, 64, 1024)  # GiB
STEPS = {"save": "blue", "info": "grey", "verify": "aqua", "instant restore": "red"}
_DATA = 256 << 20  # bytes
_ROUNDS = 3
_PYQMIGRATE = str(Path(sys.executable).with_name("pyqmigrate"))
# TCG gives a guest 40 bits of addresses, of which the machine needs some for devices.
_MOST_OF_A_GUEST = 960  # GiB


def growth(directory: Path, clear: Callable[..., None], add: Callable[..., None]) -> None:
    """Save, info and verify of memory in a memfd, each a command of its own, and instant restores of a
    guest. The facts have the most memory that the process had, without that which the guest has."""
    path = directory / "growth.mapped"
    for gib in SIZES:
        with sparse_memfd(gib * GIB, _DATA) as fd:
            memory = f"pc.ram=/proc/{os.getpid()}/fd/{fd}"
            for _ in range(_ROUNDS):
                clear(path, path.with_name(f"{path.name}.seal"))
                save = _run("pack", "--seal", "--", str(path), memory)
                for step, sample in (
                    ("save", save),
                    ("info", _run("info", str(path))),
                    ("verify", _run("verify", str(path))),
                ):
                    add(GROWTH_WORK, OURS, f"{step}, {gib} GiB", sample)
        clear(path, path.with_name(f"{path.name}.seal"))
        if shutil.which(BINARY):
            _restores(min(gib, _MOST_OF_A_GUEST), f"instant restore, {gib} GiB", path, add)
            clear(path)


def _run(*arguments: str) -> Sample:
    start = time.perf_counter()
    with subprocess.Popen([_PYQMIGRATE, "-q", *arguments], stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"pyqmigrate {' '.join(arguments)} failed: {process.returncode}")
    return Sample(seconds, used.ru_utime + used.ru_stime, {"memory_bytes": used.ru_maxrss << 10})


def _restores(gib: int, name: str, path: Path, add: Callable[..., None]) -> None:
    # Not reserved: the host need not have as much memory as the guest.
    backend = f"memory-backend-ram,id=pc.ram,size={gib}G,reserve=off"
    memory = ["-machine", "pc,memory-backend=pc.ram", "-m", f"{gib}G", "-object", backend]
    command = [BINARY, "-accel", "tcg", "-nodefaults", "-display", "none", *memory]
    with _NoRam() as unused, Qemu(unused, memory=memory) as vm:
        vm.qmp.close()
        sync.connect(vm.socket).save(path, then="quit")
    for _ in range(_ROUNDS):
        with Path(os.devnull).open("r+b") as null:
            guest = sync.restore(
                path, command, mode="instant", paused=True, stdin=null, stdout=null, stderr=null
            )
        status = Path(f"/proc/{guest.process.pid}/status").read_text()
        resident = int(status.partition("VmHWM:")[2].split()[0]) << 10
        guest.process.kill()
        guest.process.wait(30)
        facts = {"memory_bytes": resident, "gib": gib, "load_seconds": guest.report.load_seconds}
        add(GROWTH_WORK, OURS, name, Sample(guest.report.total_seconds, facts=facts))


class _NoRam(GuestRam):
    """For a QEMU that makes its own."""

    def __init__(self) -> None:
        self.length, self.memory = 1 << 20, mmap.mmap(-1, 1 << 20)
        self.fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


def draw_growth(results: Results, path: Path) -> bool:
    """Write an SVG of time and memory by size; False if growth was not measured."""
    if not results.names(GROWTH_WORK, OURS):
        return False
    svg = Svg(760, 300, "Time and memory by the size of the guest")
    for left, title, unit, value in (
        (60, "seconds", 1.0, lambda s: s.seconds),
        (440, "MiB of memory", 1 << 20, lambda s: float(s.facts["memory_bytes"])),
    ):
        curves = {
            step: [
                (k, statistics.median(value(s) / unit for s in results.of(GROWTH_WORK, OURS, name)))
                for k, gib in enumerate(SIZES)
                if (name := f"{step}, {gib} GiB") in results.names(GROWTH_WORK, OURS)
            ]
            for step in STEPS
        }
        _panel(svg, left, title, curves)
    for k, (step, colour) in enumerate(STEPS.items()):
        svg.circle(70 + 150 * k, 284, 5, colour)
        svg.text(80 + 150 * k, 288, step)
    path.write_bytes(svg.encode())
    return True


def _panel(svg: Svg, left: int, title: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    highest = max((y for points in curves.values() for _, y in points), default=1.0)
    step, scale = nice_step(highest, 6), 190 / highest
    svg.text(left, 24, title, bold=True)
    number = 0
    while number * step <= highest:
        y = 240 - number * step * scale
        svg.line([(left, y), (left + 280, y)], "grid")
        svg.text(left - 6, y + 4, f"{number * step:g}", "muted", size=11, anchor="end")
        number += 1
    for k, gib in enumerate(SIZES):
        label = "1 TiB" if gib == 1024 else f"{gib} GiB"
        svg.text(left + 70 * k, 258, label, "muted", size=11, anchor="middle")
    for name, points in curves.items():
        places = [(left + 70.0 * k, 240 - value * scale) for k, value in points]
        if len(places) > 1:
            svg.line(places, STEPS[name], width=2)
        for (x, y), (_, value) in zip(places, points, strict=True):
            svg.circle(x, y, 4, STEPS[name], tip=f"{name}: {value:.3g}")
