"""What ``csrc/postcopy.c`` sends, in plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyqmigrate.format.postcopy.records import PART_END, PART_HEADER
from pyqmigrate.format.stream.wire import WORD

__all__ = ["PART_RECORDS", "BlockTwin", "SenderTwin"]

PART_RECORDS = 16
_ZERO, _PAGE, _CONTINUE = 0x02, 0x08, 0x20


@dataclass
class BlockTwin:
    """A block; each list has an element for each page."""

    name: bytes
    page_size: int
    together: int
    data: list[bool]
    pending: list[bool]
    sent: list[bool]


class SenderTwin:
    """One connection."""

    def __init__(self, blocks: list[BlockTwin]) -> None:
        self._blocks = blocks
        self._named: BlockTwin | None = None

    def send(self, number: int, first: int, npages: int, pages: bytes, requested: bool) -> bytes:
        """Return what goes out for pages ``[first, first + npages)``, whose content is ``pages``."""
        block = self._blocks[number]
        out, records = b"", 0
        for start in self._groups(block, first, first + npages, requested):
            if records == 0:
                out += PART_HEADER
            for page in range(start, start + block.together):
                offset = (page - first) * block.page_size
                out += self._record(block, page, pages[offset : offset + block.page_size])
                block.sent[page], block.pending[page] = True, False
                records += 1
            if records >= PART_RECORDS:
                out, records = out + PART_END, 0
        return out + (PART_END if records else b"")

    @staticmethod
    def _groups(block: BlockTwin, first: int, end: int, requested: bool) -> Iterator[int]:
        for start in range(first, end, block.together):
            wanted = requested or any(block.pending[start : start + block.together])
            if wanted and not block.sent[start]:
                yield start

    def _record(self, block: BlockTwin, page: int, content: bytes) -> bytes:
        word = page * block.page_size | (_PAGE if block.data[page] else _ZERO)
        name = b""
        if self._named is block:
            word |= _CONTINUE
        else:
            name, self._named = bytes([len(block.name)]) + block.name, block
        return WORD.pack(word) + name + (content if block.data[page] else b"\0")
