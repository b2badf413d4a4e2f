"""What guest memory looks like, from samples: how much is zero, and in how many pieces the rest.

That decides which of QEMU's settings is fast: it writes every stretch of data between two zero
pages with a call of its own, and a direct write costs the same however short it is.
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

__all__ = ["Contents", "count_data", "extent_bytes", "sample"]

_SAMPLES = 64
_SAMPLE = 256 << 10  # bytes
_SMALL = 16 << 20  # blocks of less than this are ROMs and the like
_PAGE = 4096
_THREADS = "pyqmigrate-look"
_TARGET = "guest memory"  # in errors


@dataclass(frozen=True)
class Contents:
    """Estimates for ``length`` bytes of guest memory.

    ``data`` are the bytes in pages that are not all zero, ``pieces`` the stretches of such pages
    that come after a zero page.
    """

    length: int
    data: int
    pieces: int

    @property
    def zero(self) -> int:
        return self.length - self.data


def sample(guest: GuestInfo) -> Contents | None:
    """Look at a few MiB spread over the large blocks; None where none of it can be read.

    The guest may run meanwhile. Blocks, for some tens of milliseconds.
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
        except PyqmigrateError:  # it went away, or is no longer allowed: the save itself will tell
            return None
        seen, data, pieces = seen + found.length, data + found.data, pieces + found.pieces
    return Contents(total, data * total // seen, pieces * total // seen)


def _sample_block(name: str, memory: Memory, length: int, count: int) -> Contents:
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
        return Contents(count * size, data * _PAGE, pieces)
    finally:
        bitmap.close()
        attached.close()


def count_data(guest: GuestInfo, channels: int) -> int:
    """Bytes of the pages that are not zero now, of all memory that can be read; looks at all.

    The guest may run meanwhile. Blocks, for about a second per 10 GiB.
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
    """An upper bound, without looking, of what all memory that can be read holds in data."""
    total = 0
    for block in guest.blocks:
        if block.memory is not None:
            attached = attach(RamBlock(block.name, block.memory), writable=False)
            total += attached.extent_bytes
            attached.close()
    return total


def _pages(memory: OpenMemory, data: Bitmap) -> BlockPages:
    return BlockPages(BlockLayout(memory.name, memory.length, _PAGE, 0, 0, 0), data, memory)
