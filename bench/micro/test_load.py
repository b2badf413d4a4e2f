"""A whole load out of a cold page cache: opening, checking, and every page in memory."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest

from bench.disk import Disk
from bench.micro.conftest import SIZE, Memories
from pyqmigrate import RamBlock, open_snapshot, save
from tests.harness.contents import Contents


def load(path: Path, memory: mmap.mmap, **options: Any) -> None:
    with open_snapshot(path) as snapshot:
        snapshot.load({"pc.ram": memory}, **options)


def measure(benchmark: Any, expected: mmap.mmap, disk: Disk, target: Path, **options: Any) -> None:
    save(target, [RamBlock("pc.ram", expected)])
    benchmark.group = "load"
    benchmark.extra_info["bytes"] = SIZE
    with mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        benchmark.pedantic(
            load,
            args=(target, memory),
            kwargs=options,
            setup=lambda: disk.make_cold(target),
            rounds=5,
            warmup_rounds=1,
        )
        assert memory[:] == expected[:]


@pytest.mark.parametrize("contents", Contents)
def test_load(
    benchmark: Any, memories: Memories, disk: Disk, target: Path, contents: Contents
) -> None:
    measure(benchmark, memories(contents), disk, target)


@pytest.mark.parametrize("channels", [1, 4, 8])
def test_load_with_other_channels(
    benchmark: Any, memories: Memories, disk: Disk, target: Path, channels: int
) -> None:
    measure(benchmark, memories(Contents.DENSE), disk, target, channels=channels)


def test_load_through_the_page_cache(
    benchmark: Any, memories: Memories, disk: Disk, target: Path
) -> None:
    measure(benchmark, memories(Contents.DENSE), disk, target, direct_io="off")
