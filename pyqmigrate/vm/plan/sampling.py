"""Sample guest memory: how much of it is zero, and into how many pieces the rest falls.

That decides which of QEMU's settings is fast: QEMU makes one write for each run of data between
two zero pages, and a direct write costs the same however short it is.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from pyqmigrate.core import CHUNK
from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range
from pyqmigrate.io.memory import Memory, OpenMemory, RamBlock, attach
from pyqmigrate.io.pages import BlockPages, count_pages
from pyqmigrate.vm.guest.inspect import GuestInfo

__all__ = ["Sample", "count_data", "extent_bytes", "sample_memory"]

_SAMPLES = 64
_SAMPLE = 256 << 10  # bytes
_SMALL = 16 << 20  # blocks of less than this are ROMs and the like
_PAGE = 4096
_THREADS = "pyqmigrate-look"
_TARGET = "guest memory"  # in errors


@dataclass(frozen=True)
class Sample:
    """Estimates for ``length`` bytes of guest memory.

    ``data`` is the size of the pages that are not all zero, ``pieces`` the number of runs of such
    pages that follow a zero page.
    """

    length: int
    data: int
    pieces: int

    @property
    def zero(self) -> int:
        return self.length - self.data


def sample_memory(guest: GuestInfo) -> Sample | None:
    """Scan a few MiB spread over the large blocks; return None if none of it can be read.

    The guest may keep running. Blocks for some tens of milliseconds.
    """
    large = [b for b in guest.blocks if b.length >= _SMALL and b.memory is not None]
    total = sum(block.length for block in large)
    if not total:
        return None
    seen = data = pieces = 0
    for block in large:
        assert block.memory is not None
        count = max(1, _SAMPLES * block.length // total)
        try:
            found = _sample_block(block.name, block.memory, block.length, count)
        except PyqmigrateError:  # no longer readable: the save itself will report it
            return None
        seen, data, pieces = seen + found.length, data + found.data, pieces + found.pieces
    return Sample(total, data * total // seen, pieces * total // seen)


def _sample_block(name: str, memory: Memory, length: int, count: int) -> Sample:
    step = max(length // count // CHUNK, 1) * CHUNK
    count = min(count, length // step)
    size = min(_SAMPLE, step)
    attached = attach(RamBlock(name, memory), writable=False)
    bitmap = Bitmap(length // _PAGE)
    try:
        places = [Range(0, n * step // _PAGE, size // _PAGE) for n in range(count)]
        count_pages([_pages(attached, bitmap)], Channels(1, _THREADS), _TARGET, places)
        data = pieces = 0
        for place in places:
            for first, last, present in bitmap.runs(place.first, place.first + place.npages):
                # One that begins where the sample does has its beginning somewhere else.
                data += last - first if present else 0
                pieces += present and first > place.first
        return Sample(count * size, data * _PAGE, pieces)
    finally:
        bitmap.close()
        attached.close()


def count_data(guest: GuestInfo, channels: int) -> int:
    """Return the bytes in nonzero pages of all readable memory; scans every page.

    The guest may keep running. Blocks for about a second per 10 GiB.
    """
    with contextlib.ExitStack() as stack:
        blocks: list[BlockPages] = []
        for block in guest.blocks:
            if block.memory is None:
                continue
            attached = attach(RamBlock(block.name, block.memory), writable=False)
            stack.callback(attached.close)
            bitmap = Bitmap(attached.length // _PAGE)
            stack.callback(bitmap.close)
            blocks.append(_pages(attached, bitmap))
        count_pages(blocks, Channels(channels, _THREADS), _TARGET)
        return sum(block.data.count() for block in blocks) * _PAGE


def extent_bytes(guest: GuestInfo) -> int:
    """Return an upper bound of the data in readable memory, from extents alone."""
    total = 0
    for block in guest.blocks:
        if block.memory is not None:
            attached = attach(RamBlock(block.name, block.memory), writable=False)
            total += attached.extent_bytes
            attached.close()
    return total


def _pages(memory: OpenMemory, data: Bitmap) -> BlockPages:
    return BlockPages(BlockLayout(memory.name, memory.length, _PAGE, 0, 0, 0), data, memory)
