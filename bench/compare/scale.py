"""Many channels on a device that is as fast as memory, and file systems beside each other."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyqmigrate
from bench.compare.contenders import Contender, SharedRam, save_contenders
from bench.compare.mounted import KINDS, mounted, why_not
from bench.disk import Disk
from bench.results import OURS, Sample
from tests.harness.contents import Contents, fill

__all__ = ["CHANNELS", "CHANNELS_WORK", "channels", "file_system_work", "file_systems"]

CHANNELS = (1, 2, 4, 8, 16, 32)
CHANNELS_WORK = {"save": "save to memory", "load": "load from memory"}
_MOST = 1 << 29  # bytes of guest memory

TakeTurns = Callable[[str, Sequence[Contender], Callable[[], None]], None]


def file_system_work(kind: str, contents: Contents) -> str:
    """Return the name of the work."""
    return f"{kind}: save {contents}"


def file_systems(size: int, directory: Path, channel_count: int, take_turns: TakeTurns) -> None:
    """Save dense memory, and memory in runs, on each kind of file system."""
    size = min(size, _MOST)
    for kind in KINDS:
        if reason := why_not(kind):
            print(f"{kind} is left out: {reason}", file=sys.stderr)
            continue
        with mounted(kind, directory) as place, SharedRam(size, present=True) as ram:
            disk, path = Disk(place), place / "guest.mapped"
            for contents in (Contents.DENSE, Contents.RUNS):
                with memoryview(ram.memory) as memory:
                    fill(memory, contents)
                data = size if contents is Contents.DENSE else 0
                contenders = save_contenders(ram, path, disk, channel_count, data)
                work = file_system_work(kind, contents)
                take_turns(work, contenders, partial(disk.clear, path))
            disk.clear(path)


def channels(size: int, take_turns: TakeTurns) -> None:
    """Save and load dense memory with 1 to 32 channels.

    The device is ext4 on a loop device whose image is on tmpfs; without root, a directory on tmpfs.
    """
    size = min(size, _MOST)
    with tempfile.TemporaryDirectory(prefix="compare-", dir="/dev/shm") as name:
        if why_not("ext4"):
            _channels(size, Path(name), take_turns)
            return
        with mounted("ext4", Path(name)) as place:
            _channels(size, place, take_turns)


def _channels(size: int, place: Path, take_turns: TakeTurns) -> None:
    path = place / "guest.mapped"
    with SharedRam(size, present=True) as ram, SharedRam(size, present=True) as target:
        with memoryview(ram.memory) as memory:
            fill(memory, Contents.DENSE)

        def save(count: int) -> Sample:
            cpu, start = time.process_time(), time.perf_counter()
            pyqmigrate.save(path, [pyqmigrate.RamBlock("pc.ram", ram.memory)], channels=count)
            return _sample(size, start, cpu)

        def load(count: int) -> Sample:
            cpu, start = time.process_time(), time.perf_counter()
            with pyqmigrate.open_snapshot(path) as snapshot:
                snapshot.load({"pc.ram": target.memory}, channels=count)
            return _sample(size, start, cpu)

        for verb, run, before in (("save", save, _remove), ("load", load, _make_cold)):
            take_turns(
                CHANNELS_WORK[verb],
                [Contender(OURS, f"{n} channels", partial(run, n)) for n in CHANNELS],
                partial(before, path),
            )


def _sample(size: int, start: float, cpu: float) -> Sample:
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Sample(seconds, cpu, {"data_bytes": size})


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.sync()


def _make_cold(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
