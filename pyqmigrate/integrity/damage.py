"""What stands at some place of a sealed file: which block, which pages of the guest.

The seal tells it, so that the damage in a file is named that cannot be parsed any more.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pyqmigrate.format.seal import PIECE, SealHead
from pyqmigrate.format.stream.mapped_ram import BlockLayout, ByteOrder

__all__ = ["Damage", "Part", "parts_of"]


@dataclass(frozen=True)
class Part:
    """Part of a damaged stretch. ``what`` is ``pages``, ``bitmap``, or words for anything else.

    For pages and bitmaps: ``block``, and the pages ``[first_page, end_page)`` of it whose content
    cannot be trusted; ``data_pages`` is how many of them hold data by their bits, None where that
    cannot be told.
    """

    what: str
    block: str | None = None
    first_page: int | None = None
    end_page: int | None = None
    data_pages: int | None = None

    def __str__(self) -> str:
        if self.first_page is None or self.end_page is None:
            return self.what
        pages = f"page {self.first_page}"
        if self.end_page - self.first_page > 1:
            pages = f"pages {self.first_page} to {self.end_page - 1}"
        if self.what == "bitmap":
            return f"bitmap of block {self.block!r}, of its {pages}"
        held = "" if self.data_pages is None else f" ({self.data_pages} with data)"
        return f"block {self.block!r}, {pages}{held}"


@dataclass(frozen=True)
class Damage:
    """A stretch of the file that is not what was sealed: whole pieces, or what is missing or added.

    ``offset`` and ``length`` in bytes, ``why`` in words, ``parts`` what was sealed there.
    """

    offset: int
    length: int
    why: str
    parts: tuple[Part, ...] = ()

    @property
    def block(self) -> str | None:
        """The first block that is named, if any."""
        return next((part.block for part in self.parts if part.block is not None), None)

    def __str__(self) -> str:
        first, last = self.offset // PIECE, (self.offset + max(self.length, 1) - 1) // PIECE
        mib = f"MiB {first}" if first == last else f"MiB {first} to {last}"
        what = f": {'; '.join(map(str, self.parts))}" if self.parts else ""
        return f"{mib}, file offset {self.offset:#x}, {self.length} bytes: {self.why}{what}"

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "mib": self.offset // PIECE,
            "offset": self.offset,
            "length": self.length,
            "why": self.why,
            "parts": [vars(part) for part in self.parts],
        }


def parts_of(
    head: SealHead, start: int, end: int, intact: Callable[[int, int], bool], fd: int
) -> Iterator[Part]:
    """What was sealed at file positions ``[start, end)``.

    ``intact(from, to)`` says whether what is there now is what was sealed: then bitmaps are read
    from ``fd`` to tell how many pages hold data. Costs what is named, not what the seal lists.
    Raises OSError.
    """
    blocks = head.blocks
    if not blocks:
        yield Part("the stream" if end > head.offset else "what is before the stream")
        return
    if start < head.offset:
        yield Part("what is before the stream")
    for number in _hit(head, start, end):
        block = blocks[number]
        at = blocks[number - 1].pages_end if number else head.offset
        if _meet(start, end, at, block.header_end):
            yield Part(f"header of block {block.name!r}" if number else "head of the stream")
        if not block.external:
            yield from _bitmap(block, start, end)
            yield from _pages(block, start, end, intact, fd, head.bitmap_order)
    if end > blocks[-1].pages_end:
        yield Part("what follows the blocks: the device state")


def _hit(head: SealHead, start: int, end: int) -> list[int]:
    """Numbers of the blocks that have something in ``[start, end)``, be it their header."""
    blocks, bitmaps, found = head.blocks, head.bitmaps, set()
    first = bisect.bisect_right(blocks, start, key=lambda block: block.pages_end)
    for number in range(first, len(blocks)):
        if number and blocks[number - 1].pages_end >= end:
            break
        found.add(number)
    first = bisect.bisect_right(bitmaps, start, key=lambda bitmap: bitmap[1])
    for begin, _, number in bitmaps[first:]:
        if begin >= end:
            break
        found.add(number)
    return sorted(found)


def _meet(start: int, end: int, first: int, last: int) -> bool:
    return start < last and first < end


def _bitmap(block: BlockLayout, start: int, end: int) -> Iterator[Part]:
    at = block.bitmap_offset
    first, stop = max(start - at, 0) * 8, min((end - at) * 8, block.num_pages)
    if first < stop:
        yield Part("bitmap", block.name, first, stop)


def _pages(
    block: BlockLayout,
    start: int,
    end: int,
    intact: Callable[[int, int], bool],
    fd: int,
    order: ByteOrder,
) -> Iterator[Part]:
    at, page = block.pages_offset, block.page_size
    first, stop = max(start - at, 0) // page, min(-(-(end - at) // page), block.num_pages)
    if first >= stop:
        return
    words = first // 64, -(-stop // 64)
    bits = block.bitmap_offset + words[0] * 8, block.bitmap_offset + words[1] * 8
    held = None
    if intact(*bits):
        data = os.pread(fd, bits[1] - bits[0], bits[0])
        if order == "big":
            data = b"".join(data[at : at + 8][::-1] for at in range(0, len(data), 8))
        mask = (1 << stop - first) - 1
        held = (int.from_bytes(data, "little") >> first % 64 & mask).bit_count()
    yield Part("pages", block.name, first, stop, held)
