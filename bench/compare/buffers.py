"""Saves of anonymous memory of this process: contiguous, in huge pages, and in pages of 4 KiB at random places of
the machine's memory.

The bytes are those of the memory that all other contenders save.
"""

from __future__ import annotations

import contextlib
import mmap
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.compare.contenders import Contender, SharedRam, save_ours
from bench.disk import Disk
from bench.results import OURS

__all__ = ["BUFFERS", "CONTIGUOUS", "SCATTERED", "anonymous_savers"]

CONTIGUOUS, SCATTERED = "anonymous, contiguous", "anonymous, scattered"
BUFFERS = ("buffer", CONTIGUOUS, SCATTERED)
_PIECE = 32 << 20


@contextlib.contextmanager
def anonymous_savers(
    ram: SharedRam, path: Path, channels: int, disk: Disk
) -> Iterator[list[Contender]]:
    """Saves of two copies of ``ram`` to ``path``. The copies are freed at the end."""
    with contextlib.ExitStack() as stack:
        contenders = []
        for name in (CONTIGUOUS, SCATTERED):
            memory = stack.enter_context(_anonymous(ram.length, name))
            for at in range(0, ram.length, _PIECE):
                end = min(at + _PIECE, ram.length)
                memory[at:end] = ram.memory[at:end]
            run = partial(save_ours, path, memory, channels, disk)
            contenders.append(Contender(OURS, name, run))
        yield contenders


@contextlib.contextmanager
def _anonymous(length: int, kind: str) -> Iterator[mmap.mmap]:
    """Present memory. Pages that are touched in a random order are not neighbours, in the machine's memory, of the
    pages beside them."""
    with mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE if kind == CONTIGUOUS else mmap.MADV_NOHUGEPAGE)
        places = [*range(0, length, mmap.PAGESIZE)]
        if kind == SCATTERED:
            random.Random(0).shuffle(places)
        for at in places:
            memory[at] = 1
        yield memory
