"""The core alone, reading pages past the page cache: one thread, the bitmap known."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from bench.disk import Disk
from bench.micro.conftest import SIZE, Memories
from pyqmigrate import MappedRamBlock, RamBlock, _core, open_snapshot, save
from pyqmigrate.core import Block
from pyqmigrate.io.channels import split_ranges
from tests.harness.contents import Contents

ffi, lib = _core.ffi, _core.lib
ALIGNMENT = 4096
GAP = 128 << 10  # what a load reads over


def read_pages(fd: int, block: MappedRamBlock, memory: mmap.mmap) -> None:
    job = ffi.gc(lib.qm_job_create(), lib.qm_job_destroy)
    channel = ffi.gc(lib.qm_channel_create(), lib.qm_channel_destroy)
    fault = ffi.new("struct qm_fault *")
    file = ffi.new(
        "struct qm_file *",
        {"fd": fd, "fd_direct": fd, "mem_align": ALIGNMENT, "off_align": ALIGNMENT},
    )
    policy = ffi.new("struct qm_policy *", {"max_gap": GAP})
    place = Block.of(block.layout)
    with ffi.from_buffer(memory, require_writable=True) as data:
        base = ffi.cast("unsigned char *", data)
        target = ffi.new("struct qm_memory *", {"base": base, "fd": -1})
        transfer = ffi.new(
            "struct qm_transfer *",
            {
                "job": job,
                "file": file,
                "block": place.core,
                "memory": target,
                "policy": policy,
                "data": block.bitmap.core,
            },
        )
        for part in split_ranges(0, block.num_pages, block.page_size):
            failed = lib.qm_read(transfer, channel, part.first, part.npages, fault)
            if failed:
                raise OSError(-failed, os.strerror(-failed))


@pytest.mark.parametrize("contents", Contents)
def test_read_with_one_thread(
    benchmark: Any, memories: Memories, disk: Disk, target: Path, contents: Contents
) -> None:
    save(target, [RamBlock("pc.ram", memories(contents))])
    benchmark.group = "read"
    benchmark.extra_info["bytes"] = SIZE
    fd = os.open(target, os.O_RDONLY | os.O_DIRECT)
    try:
        with (
            open_snapshot(target) as snapshot,
            mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
        ):
            benchmark.pedantic(
                read_pages,
                args=(fd, snapshot.blocks["pc.ram"], memory),
                setup=lambda: disk.make_cold(target),
                rounds=5,
                warmup_rounds=1,
            )
            assert memory[:] == memories(contents)[:]
    finally:
        os.close(fd)
