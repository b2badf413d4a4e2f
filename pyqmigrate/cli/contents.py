"""A synthetic guest memory: a third dense, a third runs, a third speckled.

==========  =============================================================================
dense       every page has data
runs        half of it is zero, in runs of 64 KiB at random places
speckled    30 % of the pages are zero, single pages of 4 KiB at random places
==========  =============================================================================
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
from collections.abc import Iterator

from pyqmigrate.cli.sizes import MIB
from pyqmigrate.io.mapping import unmap

__all__ = ["PAGE", "SMALLEST", "fill", "first_difference", "guest_memory"]

PAGE = 4096
SMALLEST = 8 * MIB  # bytes of a memory in which all three parts show

_PARTS = ((MIB, 0.0), (64 << 10, 0.5), (PAGE, 0.3))  # bytes a piece, share of zero pieces
_NOISE = 16 * MIB


@contextlib.contextmanager
def guest_memory(size: int) -> Iterator[mmap.mmap]:
    """Allocate ``size`` zero bytes of private memory, and free them at the end."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        yield memory
    finally:
        unmap(memory)


def fill(memory: mmap.mmap, seed: int = 0) -> None:
    """Fill ``memory``, which is all zeros and whole MiB; ``seed`` decides which pages stay zero.

    The data are pieces of one buffer of noise, so this takes little longer than a copy.
    """
    choices = random.Random(seed)
    third = len(memory) // len(_PARTS) // MIB * MIB
    ends = (third, 2 * third, len(memory))
    begin = 0
    with memoryview(os.urandom(_NOISE)) as noise:
        for (piece, zero_share), end in zip(_PARTS, ends, strict=True):
            for start in range(begin, end, piece):
                if choices.random() >= zero_share:
                    offset = choices.randrange(_NOISE - piece)
                    memory[start : start + piece] = noise[offset : offset + piece]
            begin = end


def first_difference(left: mmap.mmap, right: mmap.mmap) -> int | None:
    """Return the byte offset of the first page in which two memories of one size differ, or None."""
    for offset in range(0, len(left), MIB):
        if left[offset : offset + MIB] != right[offset : offset + MIB]:
            for page in range(offset, offset + MIB, PAGE):
                if left[page : page + PAGE] != right[page : page + PAGE]:
                    return page
    return None
