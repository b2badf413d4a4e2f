"""Page records of a post-copy migration: one for each page, in short PARTs.

A record is a word, ``u64 offset | flags``, a block's name unless it continues with that of the record
before, and the page; of a zero page only the byte 0. QEMU holds a lock while it reads a PART, so PARTs are
short. All records of one page of the destination's memory are in order in one PART.
"""

from __future__ import annotations

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
        self, block: str, page_size: int, pages: list[tuple[int, RecordData | None]]
    ) -> list[RecordData]:
        """Return the pieces of a PART, to be sent one after another; pages are not copied.

        pages: the number and the content of each page of the block; None for a zero page.
        """
        out: list[RecordData] = [self._header]
        for page, data in pages:
            kind = _ZERO if data is None else _PAGE
            word = page * page_size | kind
            if self._last == block:
                out.append(WORD.pack(word | _CONTINUE))
            else:
                name = block.encode("utf-8", "surrogateescape")
                out += (WORD.pack(word), bytes([len(name)]) + name)
                self._last = block
            out.append(_NOTHING if data is None else data)
        out.append(RAM_EOS)
        return out
