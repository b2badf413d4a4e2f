"""The core tells memory in contiguous pieces of the machine's memory from scattered pages."""

from __future__ import annotations

import mmap
import os
import random
import struct
import subprocess
import sys

import pytest

from pyqmigrate._core import ffi, lib

PAGE = mmap.PAGESIZE
PAGES = 4096
LEAST_PIECE = 32 << 10

# As a user who is not told where pages are; what is imported may be readable for root alone.
ORDINARY_USER = """
import ctypes, mmap, os
from pyqmigrate._core import ffi, lib
os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is this user's again
pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE):
    memory = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)
    memory.write(b"x" * len(memory))
    bytes_ = ffi.from_buffer("unsigned char[]", memory)
    print(lib.qm_is_scattered(pagemap, bytes_ + (2 << 20), 4 << 20))
"""


def memory_touched_in(order: list[int]) -> mmap.mmap:
    memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for page in order:
        memory[page * PAGE] = 1
    return memory


def is_scattered(memory: mmap.mmap, page: int, pages: int) -> bool:
    """The twin."""
    start = int(ffi.cast("uintptr_t", ffi.from_buffer("unsigned char[]", memory))) // PAGE
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        words = os.pread(pagemap.fileno(), pages * 8, (start + page) * 8)
    frames = [word & ((1 << 55) - 1) for (word,) in struct.iter_unpack("<Q", words)]
    pieces, following = 0, 0
    for frame in frames:
        pieces += frame != following
        following = frame + 1
    return pages * PAGE < LEAST_PIECE * pieces


@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel tells only root where pages are")
@pytest.mark.parametrize("group", [1, 4, 16, 1024])
def test_memory_is_scattered_if_its_contiguous_pieces_are_short(group: int) -> None:
    groups = [*range(0, PAGES, group)]
    random.Random(group).shuffle(groups)
    memory = memory_touched_in([page for first in groups for page in range(first, first + group)])
    bytes_ = ffi.from_buffer("unsigned char[]", memory)
    with open("/proc/self/pagemap", "rb") as pagemap:
        found = [
            lib.qm_is_scattered(pagemap.fileno(), bytes_ + first * PAGE, 1024 * PAGE)
            for first in range(0, PAGES, 1024)
        ]
    assert found == [is_scattered(memory, first, 1024) for first in range(0, PAGES, 1024)]
    if group == 1:
        assert all(found)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_knows_huge_pages_only() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", ORDINARY_USER], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["0", "1"]


def test_memory_is_scattered_if_nobody_tells_where_it_is() -> None:
    assert lib.qm_is_scattered(-1, ffi.from_buffer(bytearray(1 << 20)), 1 << 20)
