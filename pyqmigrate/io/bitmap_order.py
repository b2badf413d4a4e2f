"""In which byte order a file's bitmaps are: that of the host that wrote it.

Nothing in the file records it (docs/internals/format.md, "Bitmap"), but the file can show it: a page
whose bit is set has its bytes there, and in the wrong order bits fall over holes. The two orders set
equally many bits in each 64 pages, so that of two counts one is enough: the order with more of its
bits over data explains the file better. An order that sets bits past the end of a block, or of the
file, is impossible.

A file without holes shows nothing, nor does one whose blocks are all data or all zero.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.stream.mapped_ram import BlockLayout, ByteOrder
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.holes import next_data, next_hole
from pyqmigrate.io.input import Source

__all__ = ["better_order", "find_order", "other_order", "says_better"]

_EXTENTS = 4096  # stretches of data that are looked at in each block
_S390 = "s390-ccw"  # under KVM its host is big-endian, emulated it may be any


def other_order(order: ByteOrder) -> ByteOrder:
    return "little" if order == "big" else "big"


def find_order(source: Source, blocks: Sequence[BlockLayout], machine: str) -> ByteOrder:
    """``big`` where the file leaves no doubt, otherwise ``little``.

    No doubt: a big-endian host is to be expected (an s390 guest, or this host is one), all that
    big-endian bitmaps set is there, and little-endian ones fit worse. Reads bitmaps and looks for
    holes in that case only. Raises TargetError.
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
    """The other order than ``order``, if that explains the file better; None otherwise, and where
    ``order`` is impossible. Raises TargetError."""
    mine = _fit(source, blocks, order)
    other = None if mine is None else _fit(source, blocks, other_order(order))
    better = mine is not None and other is not None and other.there > mine.there
    return other_order(order) if better else None


def says_better(order: ByteOrder) -> str:
    """A sentence for people: this order would explain the file better."""
    return (
        f"the bitmaps fit the file better as those of a {order}-endian host: more of the pages that"
        f" they mark have data (bitmap_order, --bitmap-order {order})"
    )


@dataclass(frozen=True)
class _Fit:
    """How many bits are ``set`` where was looked, and how many of these over data: ``there``."""

    set: int
    there: int


def _fit(source: Source, blocks: Sequence[BlockLayout], order: ByteOrder) -> _Fit | None:
    """None for an impossible order."""
    marked = there = 0
    for block in blocks:
        if block.external:
            continue
        try:
            bitmap = Bitmap.read_from(source, block, order)
        except SnapshotError:
            return None
        try:
            looked_at = 0
            for first, end in _data_pages(source, block):
                there += bitmap.count_between(max(first, looked_at), end)
                looked_at = end
            marked += bitmap.count(looked_at)
        finally:
            bitmap.close()
    return _Fit(marked, there)


def _data_pages(source: Source, block: BlockLayout) -> Iterator[tuple[int, int]]:
    """Stretches of pages, ``[first, end)``, that are not all in holes; after the last of them, as
    far as was looked, an empty one."""
    start, stop = block.pages_offset, min(block.pages_end, source.size)
    at = end = start
    for _ in range(_EXTENTS):
        at = next_data(source.fd, end, stop)
        if at >= stop:
            end = stop
            break
        end = next_hole(source.fd, at, stop)
        yield (at - start) // block.page_size, -(-(end - start) // block.page_size)
    last = max(0, end - start) // block.page_size
    yield last, last
