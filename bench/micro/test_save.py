"""A whole save, from the call to the durable file under its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.disk import Disk
from bench.micro.conftest import SIZE, Memories
from pyqmigrate import RamBlock, save
from tests.harness.contents import Contents


def measure(
    benchmark: Any, memory: Any, disk: Disk, target: Path, before: Any = None, **options: Any
) -> None:
    benchmark.group = "save"
    benchmark.extra_info["bytes"] = SIZE
    report = benchmark.pedantic(
        save,
        args=(target, [RamBlock("pc.ram", memory)]),
        kwargs=options,
        setup=before or (lambda: disk.clear(target)),
        rounds=3,
    )
    assert report.data_pages + report.zero_pages == SIZE // 4096
    benchmark.extra_info["bytes_allocated"] = report.bytes_allocated
    benchmark.extra_info["direct_io"] = report.direct_io_reason


@pytest.mark.parametrize("contents", Contents)
def test_save(
    benchmark: Any, memories: Memories, disk: Disk, target: Path, contents: Contents
) -> None:
    measure(benchmark, memories(contents), disk, target)


@pytest.mark.parametrize("channels", [1, 4])
def test_save_with_other_channels(
    benchmark: Any, memories: Memories, disk: Disk, target: Path, channels: int
) -> None:
    measure(benchmark, memories(Contents.DENSE), disk, target, channels=channels)


def test_save_through_the_page_cache(
    benchmark: Any, memories: Memories, disk: Disk, target: Path
) -> None:
    measure(benchmark, memories(Contents.DENSE), disk, target, direct_io="off")


def test_save_over_a_file_that_is_allocated(
    benchmark: Any, memories: Memories, disk: Disk, target: Path
) -> None:
    memory = memories(Contents.DENSE)
    save(target, [RamBlock("pc.ram", memory)])
    measure(benchmark, memory, disk, target, before=disk.clear, reuse=True)
