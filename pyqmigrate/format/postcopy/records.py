"""Page records of a post-copy migration: one for each page, in short PARTs.

A record is a word, ``u64 offset | flags``, a block's name unless it continues with that of the record
before, and the page; of a zero page only the byte 0. QEMU holds a lock while it reads a PART, so PARTs are
short. All records of one page of the destination's memory are in order in one PART.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from pyqmigrate.format.stream.wire import WORD
from pyqmigrate.format.stream.writer import RAM_EOS, encode_part_header

__all__ = ["PartEncoder", "RecordData"]

_ZERO, _PAGE, _CONTINUE = 0x02, 0x08, 0x20
_NOTHING = b"\0"

RecordData = bytes | bytearray | memoryview


class PartEncoder:
    """Encodes PARTs of one connection, which remember the block of the last record."""

    def __init__(self) -> None:
        self._last: str | None = None
        self._header = encode_part_header()

    def encode(
        self, block: str, page_size: int, runs: Iterable[tuple[int, int, memoryview | None]]
    ) -> list[RecordData]:
        """Return the pieces of a PART, to be sent one after another; pages are not copied.

        runs: pages ``[first, end)`` of the block, each with their content; None for zero pages.
        """
        out: list[RecordData] = [self._header]
        for first, end, content in runs:
            if self._last != block:
                self._name_block(out, block, page_size, first, content)
                first += 1
                content = None if content is None else content[page_size:]
            flags = _CONTINUE | (_ZERO if content is None else _PAGE)
            start = first * page_size | flags
            words = map(WORD.pack, range(start, end * page_size | flags, page_size))
            if content is None:
                pages: Iterable[RecordData] = itertools.repeat(_NOTHING)
            else:
                length = (end - first) * page_size
                pages = [content[k : k + page_size] for k in range(0, length, page_size)]
            for word, page in zip(words, pages, strict=False):
                out += (word, page)
        out.append(RAM_EOS)
        return out

    def _name_block(
        self,
        out: list[RecordData],
        block: str,
        page_size: int,
        page: int,
        content: memoryview | None,
    ) -> None:
        """Add the record of a page that names its block."""
        name = block.encode("utf-8", "surrogateescape")
        word = page * page_size | (_ZERO if content is None else _PAGE)
        out += (WORD.pack(word), bytes([len(name)]) + name)
        out.append(_NOTHING if content is None else content[:page_size])
        self._last = block
