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
    """``size`` bytes of private zeros, given back at the end."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        yield memory
    finally:
        unmap(memory)


def fill(memory: mmap.mmap, seed: int = 0) -> None:
    """Fill ``memory``, zeros and whole MiB of it; where the zeros stay depends on ``seed`` only.

    The data are pieces of one stretch of noise, so that this takes little longer than a copy.
    """
    places = random.Random(seed)
    third = len(memory) // len(_PARTS) // MIB * MIB
    ends = (third, 2 * third, len(memory))
    at = 0
    with memoryview(os.urandom(_NOISE)) as noise:
        for (piece, zero_share), end in zip(_PARTS, ends, strict=True):
            for start in range(at, end, piece):
                if places.random() >= zero_share:
                    n = places.randrange(_NOISE - piece)
                    memory[start : start + piece] = noise[n : n + piece]
            at = end


def first_difference(one: mmap.mmap, other: mmap.mmap) -> int | None:
    """The first page, by its byte offset, in which two memories of one size differ; or None."""
    for at in range(0, len(one), MIB):
        if one[at : at + MIB] != other[at : at + MIB]:
            for page in range(at, at + MIB, PAGE):
                if one[page : page + PAGE] != other[page : page + PAGE]:
                    return page
    return None
