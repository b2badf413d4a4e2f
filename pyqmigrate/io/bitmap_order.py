"""Find the byte order of a file's bitmaps: that of the host that wrote it.

The file does not record it (docs/internals/format.md, "Bitmap"), but its holes can show it: a page
whose bit is set has data in the file, and in the wrong order some set bits are over holes. Both
orders set the same number of bits in each 64 pages, so the order with more of its bits over data fits
the file better. An order that sets bits past the end of a block, or of the file, is impossible.

A file without holes shows nothing, nor does one whose blocks are all data or all zero.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.stream.mapped_ram import BlockLayout, ByteOrder
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.holes import next_data, next_hole
from pyqmigrate.io.input import Source

__all__ = ["better_order", "find_order", "other_order", "says_better"]

_EXTENTS = 4096  # extents of data that are examined in each block
_S390 = "s390-ccw"  # under KVM its host is big-endian, emulated it may be any


def other_order(order: ByteOrder) -> ByteOrder:
    return "little" if order == "big" else "big"


def find_order(source: Source, blocks: Sequence[BlockLayout], machine: str) -> ByteOrder:
    """Return ``big`` if the file is certainly big-endian, otherwise ``little``.

    Certainly: a big-endian host is likely (an s390 guest, or this host is big-endian), all bits of
    big-endian bitmaps are over data, and little-endian ones fit worse. Bitmaps and holes are read
    only if such a host is likely. Raises TargetError.
    """
    if not machine.startswith(_S390) and sys.byteorder != "big":
        return "little"
    big = _fit(source, blocks, "big")
    if big is None or big.there < big.set:
        return "little"
    little = _fit(source, blocks, "little")
    return "big" if little is None or little.there < big.there else "little"


def better_order(
    source: Source, blocks: Sequence[BlockLayout], order: ByteOrder
) -> ByteOrder | None:
    """Return the order that is not ``order`` if it fits the file better; otherwise, or if ``order``
    is impossible, None. Raises TargetError."""
    mine = _fit(source, blocks, order)
    other = None if mine is None else _fit(source, blocks, other_order(order))
    better = mine is not None and other is not None and other.there > mine.there
    return other_order(order) if better else None


def says_better(order: ByteOrder) -> str:
    """Return a sentence for people: this order would fit the file better."""
    return (
        f"the bitmaps fit the file better as those of a {order}-endian host: more of the pages that"
        f" they mark have data (bitmap_order, --bitmap-order {order})"
    )


class _Fit(NamedTuple):
    """How many bits are ``set`` in the examined pages, and how many of these are over data:
    ``there``."""

    set: int
    there: int


def _fit(source: Source, blocks: Sequence[BlockLayout], order: ByteOrder) -> _Fit | None:
    """Return how well the order fits; None for an impossible order."""
    marked = there = 0
    for block in blocks:
        if block.external:
            continue
        try:
            bitmap = Bitmap.read_from(source, block, order)
        except SnapshotError:
            return None
        try:
            examined = 0
            for first, end in _data_pages(source, block):
                there += bitmap.count_between(max(first, examined), end)
                examined = end
            marked += bitmap.count(examined)
        finally:
            bitmap.close()
    return _Fit(marked, there)


def _data_pages(source: Source, block: BlockLayout) -> Iterator[tuple[int, int]]:
    """Yield ranges of pages, ``[first, end)``, that are not all in holes; at last an empty range
    where the examined pages end."""
    start, stop = block.pages_offset, min(block.pages_end, source.size)
    end = start
    for _ in range(_EXTENTS):
        offset = next_data(source.fd, end, stop)
        if offset >= stop:
            end = stop
            break
        end = next_hole(source.fd, offset, stop)
        yield (offset - start) // block.page_size, -(-(end - start) // block.page_size)
    last = max(0, end - start) // block.page_size
    yield last, last
