"""``pyqmigrate.vm`` on a real QEMU: its saves beside QEMU's own, and restores."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.contenders import Contender, SharedRam
from bench.contents import Contents, fill
from bench.disk import Disk
from bench.results import OURS, QEMU, Sample
from pyqmigrate.vm import sync
from tests.qemu.machine import BINARY, Mode, Qemu

__all__ = ["INSTANT_WORK", "RESTORE_WORK", "VM_DIRECT", "VM_QEMU", "restores", "vm_savers"]

VM_DIRECT, VM_QEMU = "vm save, engine direct", "vm save, engine qemu"
INSTANT_WORK, RESTORE_WORK = "instant restore", "restore of a cold file"
_GIB = 1 << 30
_INSTANT_SIZES = (1, 4, 8)  # GiB
_INSTANT_DATA = 256 << 20  # bytes; the rest of the memory was never touched
_INSTANT_ROUNDS = 5


def vm_savers(ram: SharedRam, path: Path, channels: int) -> list[Contender]:
    """Both engines of ``vm save``; the time is the report's, up to the moment of the name."""
    if not shutil.which(BINARY):
        return []
    return [
        Contender(OURS, name, partial(_save, ram, path, engine, channels))
        for name, engine in ((VM_DIRECT, "direct"), (VM_QEMU, "qemu"))
    ]


def _save(ram: SharedRam, path: Path, engine: str, channels: int) -> Sample:
    with Qemu(ram, extra=["-mem-prealloc"]) as vm:
        vm.qmp.close()  # a monitor serves one client
        start = time.perf_counter()
        report = sync.connect(vm.socket).save(path, engine=engine, channels=channels)
        seconds = time.perf_counter() - start
    used = {name: setting.value for name, setting in report.settings.items()}
    return Sample(seconds, facts={"settings": str(used), "why": report.why})


def restores(
    size: int, path: Path, disk: Disk, repeat: int, add: Callable[[str, str, str, Sample], None]
) -> None:
    """Instant restores of several sizes, and loads of ``size`` bytes, half of them zero."""
    if not shutil.which(BINARY):
        return
    for gib in _INSTANT_SIZES:
        with _saved(gib * _GIB, path, min(_INSTANT_DATA, gib * _GIB)):
            for _ in range(_INSTANT_ROUNDS):
                add(INSTANT_WORK, OURS, f"{gib} GiB", _restore(path, gib * _GIB, "instant"))
        disk.clear(path)
    with _saved(size, path, size):
        for _ in range(repeat):
            disk.make_cold(path)
            add(RESTORE_WORK, OURS, "vm restore, load", _restore(path, size, "load"))
            for count in (2, 8):
                disk.make_cold(path)
                mode = Mode(channels=count, multifd=True, direct_io=True)
                add(RESTORE_WORK, QEMU, str(mode), _load(path, size, mode))
    disk.clear(path)


@contextlib.contextmanager
def _saved(size: int, path: Path, data: int) -> Iterator[None]:
    with SharedRam(size, present=False) as ram:
        with memoryview(ram.memory)[:data] as memory:
            fill(memory, Contents.RUNS)
        with Qemu(ram) as vm:
            vm.qmp.close()
            sync.connect(vm.socket).save(path, then="quit")
    yield


def _restore(path: Path, size: int, mode: str) -> Sample:
    command = [
        BINARY, "-accel", "tcg", "-nodefaults", "-display", "none", "-machine", "pc",
        "-m", f"{size >> 20}M",
    ]  # fmt: skip
    with Path(os.devnull).open("r+b") as null:
        guest = sync.restore(
            path, command, mode=mode, paused=True, stdin=null, stdout=null, stderr=null
        )
    guest.process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        guest.process.wait(30)
    report = guest.report
    return Sample(report.load_seconds, facts={
        "start_seconds": report.start_seconds, "total_seconds": report.total_seconds,
        "settings": str(report.settings),
    })  # fmt: skip


def _load(path: Path, size: int, mode: Mode) -> Sample:
    with SharedRam(size, present=False) as ram, Qemu(ram, incoming=True, private=True) as vm:
        start = time.perf_counter()
        vm.load(path, mode, limit=900)
        return Sample(time.perf_counter() - start)
