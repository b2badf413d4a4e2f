"""The core alone, writing pages past the page cache: one thread, no head, no bitmaps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench.disk import Disk
from bench.micro.conftest import SIZE, Memories
from pyqmigrate import _core
from pyqmigrate.core import Policy
from pyqmigrate.io.channels import split_ranges
from pyqmigrate.snapshot.save.writer import Sparse
from tests.harness.contents import Contents

ffi, lib = _core.ffi, _core.lib
PAGE = 4096
ALIGNMENT = 4096


def write_pages(path: Path, memory: Any, policy: Policy) -> int:
    """Writes to a new file and makes it durable; returns how many pages held data."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fd_direct = os.open(path, os.O_RDWR | os.O_DIRECT)
    job = ffi.gc(lib.qm_job_create(), lib.qm_job_destroy)
    channel = ffi.gc(lib.qm_channel_create(), lib.qm_channel_destroy)
    bits = ffi.new("uint64_t[]", SIZE // PAGE // 64)
    fault = ffi.new("struct qm_fault *")
    file = ffi.new(
        "struct qm_file *",
        {"fd": fd, "fd_direct": fd_direct, "mem_align": ALIGNMENT, "off_align": ALIGNMENT},
    )
    block = ffi.new("struct qm_block *", {"len": SIZE, "pages_offset": 0, "page_size": PAGE})
    try:
        os.ftruncate(fd, SIZE)
        with ffi.from_buffer(memory) as data:
            base = ffi.cast("unsigned char *", data)
            source = ffi.new("struct qm_memory *", {"base": base, "fd": -1})
            transfer = ffi.new(
                "struct qm_transfer *",
                {
                    "job": job,
                    "file": file,
                    "block": block,
                    "memory": source,
                    "policy": policy.core,
                    "data": bits,
                },
            )
            for part in split_ranges(0, SIZE // PAGE, PAGE):
                failed = lib.qm_write(transfer, channel, part.first, part.npages, fault)
                if failed:
                    raise OSError(-failed, os.strerror(-failed), str(path))
        os.fsync(fd)
    finally:
        os.close(fd_direct)
        os.close(fd)
    return int(lib.qm_count(bits, SIZE // PAGE, ffi.new("int64_t *")))


# Without zero pages the policies do the same; exact on speckled is a call a page or two, which
# takes seconds a round.
@pytest.mark.parametrize(
    ("contents", "sparse"),
    [
        (Contents.DENSE, Sparse.AUTO),
        (Contents.RUNS, Sparse.AUTO),
        (Contents.RUNS, Sparse.EXACT),
        (Contents.RUNS, Sparse.DENSE),
        (Contents.SPECKLED, Sparse.AUTO),
        (Contents.SPECKLED, Sparse.DENSE),
    ],
)
def test_write_with_one_thread(
    benchmark: Any, memories: Memories, disk: Disk, target: Path, contents: Contents, sparse: Sparse
) -> None:
    memory, policy = memories(contents), sparse.policy()
    benchmark.group = "write"
    benchmark.extra_info["bytes"] = SIZE
    written = benchmark.pedantic(
        write_pages, args=(target, memory, policy), setup=lambda: disk.clear(target), rounds=3
    )
    assert written > 0
