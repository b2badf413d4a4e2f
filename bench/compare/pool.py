"""A pool of guests: how soon one that was taken speaks, and how many resets a second there are.

``vm pool`` runs as a process of its own, and its client is this one. The guest has 64 MiB, half of them
data, and writes to its serial port all the time; nothing of its memory has to be read for that.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.compare.contenders import SharedRam
from bench.disk import Disk
from bench.results import OURS, Sample
from pyqmigrate.vm import sync
from tests.harness.contents import Contents, fill
from tests.harness.machine import BINARY, Qemu
from tests.harness.pools import PoolClient, pool_process

__all__ = ["RESET_WORK", "TAKE_WORK", "pool"]

TAKE_WORK = "pool, from take to the guest's next serial byte"
RESET_WORK = "pool, a reset among many"

_MACHINES = ("microvm", "pc")
_MEMORY, _DATA = 64 << 20, 32 << 20
_READY = 3
_TAKES, _RESETS, _RESET_ROUNDS = 40, 100, 3
_REST = 0.3  # seconds for the starts that a take has caused
_TICKS = os.sysconf("SC_CLK_TCK")


def pool(
    directory: Path,
    disk: Disk,
    chatterer: Callable[[Path], Path],
    add: Callable[[str, str, str, Sample], None],
) -> None:
    """Measure a pool on each machine; ``chatterer`` makes the guest's firmware in a directory."""
    if not shutil.which(BINARY):
        return
    path = directory / "pool.mapped"
    for machine in _MACHINES:
        with tempfile.TemporaryDirectory(prefix="pool-") as name:
            place = Path(name)
            bios = chatterer(place)
            _save(path, machine, bios)
            with _running(path, place, machine, bios) as (pid, client):
                for sample in _takes(place, client):
                    add(TAKE_WORK, OURS, machine, sample)
                for _ in range(_RESET_ROUNDS):
                    add(RESET_WORK, OURS, machine, _resets(pid, client))
        disk.clear(path)


def _save(path: Path, machine: str, bios: Path) -> None:
    """Save a guest that runs."""
    with SharedRam(_MEMORY, present=False) as ram:
        with memoryview(ram.memory)[:_DATA] as memory:
            fill(memory, Contents.RUNS)
        with Qemu(ram, machine=machine, bios=bios, run=True) as vm:
            vm.qmp.close()
            sync.connect(vm.socket).save(path, then="quit")


@contextmanager
def _running(path: Path, place: Path, machine: str, bios: Path) -> Iterator[tuple[int, PoolClient]]:
    command = [BINARY, "-accel", "tcg", "-nodefaults", "-display", "none", "-machine", machine]
    command += ["-m", f"{_MEMORY >> 20}M", "-bios", str(bios)]
    command += ["-serial", f"unix:{place}/{{n}}.serial,server=on,wait=off"]
    with (
        pool_process(path, command, place / "socket", "--ready", str(_READY)) as (process, _),
        PoolClient(place / "socket") as client,
    ):
        yield process.pid, client


def _takes(place: Path, client: PoolClient) -> Iterator[Sample]:
    """Take guests one at a time. Serial ports are connected ahead, as QEMU listens from its start."""
    for _ in range(_TAKES):
        while client.ask("status")["ready"] < _READY:
            time.sleep(0.01)
        time.sleep(_REST)
        with ExitStack() as stack:
            serials = {}
            for name in place.glob("*.serial"):
                serials[name.stem] = stack.enter_context(socket.socket(socket.AF_UNIX))
                serials[name.stem].connect(str(name))
            start = time.perf_counter()
            guest = client.ask("take")["guest"]
            answered = time.perf_counter() - start
            said = serials[str(guest["number"])].recv(1)
            seconds = time.perf_counter() - start
        if said != b".":
            raise AssertionError(f"guest {guest['number']} did not speak")
        client.ask("end")
        yield Sample(seconds, facts={"answered_seconds": answered})


def _resets(pid: int, client: PoolClient) -> Sample:
    """Reset a guest again and again; return the times of one reset."""
    client.ask("take")
    cpu, start = _processor_seconds(pid), time.perf_counter()
    for _ in range(_RESETS):
        client.ask("reset")
    seconds, cpu = time.perf_counter() - start, _processor_seconds(pid) - cpu
    client.ask("end")
    return Sample(seconds / _RESETS, cpu / _RESETS)


def _processor_seconds(pid: int) -> float:
    """Return the processor time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS
