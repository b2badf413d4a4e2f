"""What a seal costs: on a save, and by reading a file that is cold or cached."""

from __future__ import annotations

import mmap
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyqmigrate
from bench.compare.contenders import Contender, SharedRam, fio_read_contenders
from bench.disk import Disk
from bench.results import OURS, Sample
from tests.harness.contents import Contents, fill

__all__ = ["CACHED", "COLD", "PLAIN", "SEALED", "seal_work", "seals"]

COLD, CACHED = "verify cold", "verify cached"
PLAIN, SEALED = "without a seal", "with a seal"
_CHANNELS = (4, 2, 8, 16)  # the first is what verify_seal takes by default
_CACHED_ROUNDS = 5

TakeTurns = Callable[..., None]
"""Of Bench: ``take_turns(work, contenders, before)``."""


def seal_work(contents: Contents) -> str:
    """The name of the work."""
    return f"sealed save {contents}"


def seals(
    size: int,
    path: Path,
    disk: Disk,
    channels: int,
    repeat: int,
    take_turns: TakeTurns,
    add: Callable[[str, str, str, Sample], None],
) -> None:
    """Saves of the same memory with and without a seal, then the dense one held against it."""
    with SharedRam(size, present=True) as ram:
        for contents in (Contents.RUNS, Contents.DENSE):
            with memoryview(ram.memory) as memory:
                fill(memory, contents)
            _saves(seal_work(contents), ram.memory, path, disk, channels, repeat, add)
        disk.clear(path, _seal_of(path))
        _save(path, ram.memory, channels, "xxh3-128")
    ours = [
        Contender(OURS, f"{count} channels", partial(_verify, path, count, "on"))
        for count in _CHANNELS
    ]
    take_turns(COLD, [*ours, *fio_read_contenders(path)], lambda: _cool_down(disk, path))
    path.read_bytes()
    for _ in range(_CACHED_ROUNDS):
        add(CACHED, OURS, "1 channel", _verify(path, 1, "off"))
    disk.clear(path, _seal_of(path))


def _saves(
    work: str,
    memory: mmap.mmap,
    path: Path,
    disk: Disk,
    channels: int,
    repeat: int,
    add: Callable[[str, str, str, Sample], None],
) -> None:
    """In pairs, each in another order: a disk drifts more in a minute than a seal costs."""
    for n in range(repeat):
        for name in random.Random(n).sample((PLAIN, SEALED), 2):
            disk.clear(path, _seal_of(path))
            sample = _save(path, memory, channels, "xxh3-128" if name == SEALED else None)
            add(work, OURS, name, sample)


def _save(path: Path, memory: Any, channels: int, seal: str | None) -> Sample:
    cpu, start = time.process_time(), time.perf_counter()
    pyqmigrate.save(path, [pyqmigrate.RamBlock("pc.ram", memory)], channels=channels, seal=seal)
    return Sample(time.perf_counter() - start, time.process_time() - cpu)


def _verify(path: Path, channels: int, direct_io: str) -> Sample:
    cpu, start = time.process_time(), time.perf_counter()
    check = pyqmigrate.verify_seal(path, channels=channels, direct_io=direct_io)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if check is None or not check.intact:
        raise AssertionError("the file is not what was sealed")
    return Sample(seconds, cpu, {"data_bytes": check.bytes_read})


def _cool_down(disk: Disk, path: Path) -> None:
    """Out of the page cache; and a disk with a burst allowance gives everybody the same of it."""
    disk.make_cold(path)
    time.sleep(2)


def _seal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.seal")
