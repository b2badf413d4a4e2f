"""Skipping the bodies of live sections that are not RAM.

Their bodies have neither a length nor an entry in the description, so a reader has to understand
each. Three are known (docs/internals/format.md, "Other live sections"); the others are private to
their devices.

- ``dirty-bitmap`` version 1: chunks of flags, names by flag, content by flag, up to a chunk
  with the end flag;
- ``spapr/htab`` version 1: START is one word, the others a zero word and runs of hash table
  entries up to an all-zero run;
- ``s390-storage_attributes`` version 0: 64-bit words with flags in the low bits.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.cursor import Cursor

__all__ = ["CHUNKS_MAX", "ChunkBudget", "body_reader"]

CHUNKS_MAX = 1 << 20  # chunks with next to nothing in them, in one stream
_CONTENT = 16  # bytes; chunks with more content are bounded by the file's size


class ChunkBudget:
    """The chunks left for the bodies of one stream: bounds the time to read them."""

    def __init__(self) -> None:
        self._left = CHUNKS_MAX

    def charge(self, content: int, what: str, cursor: Cursor) -> None:
        """Charge a chunk with ``content`` bytes beside its head. Raises SnapshotError if none is
        left."""
        if content < _CONTENT:
            self._left -= 1
            if self._left < 0:
                raise SnapshotError(
                    f"{what} and those before it have more than {CHUNKS_MAX} empty parts",
                    offset=cursor.position,
                )


BodyReader = Callable[[Cursor, bool, ChunkBudget], None]


def body_reader(name: str, version: int) -> BodyReader | None:
    """Return the function that skips a live section's body, or None if the section is not known.

    The function takes a cursor at the body's start, whether the element is a START, and the
    stream's budget of chunks; it leaves the cursor at the body's end, and raises
    :class:`SnapshotError` for a body that is malformed.
    """
    return _BODY_READERS.get((name, version))


_EOS, _ZEROES, _BITMAP_NAME, _NODE_NAME = 0x01, 0x02, 0x04, 0x08
_START, _COMPLETE, _BITS = 0x10, 0x20, 0x40
_MORE_FLAGS = 0x80


def _dirty_bitmap(cursor: Cursor, start: bool, budget: ChunkBudget) -> None:
    what = "a dirty-bitmap section"
    while True:
        content = 0
        flags = _dirty_bitmap_flags(cursor, what)
        if flags & _NODE_NAME:
            cursor.skip(cursor.u8(what), what)
        if flags & _BITMAP_NAME:
            cursor.skip(cursor.u8(what), what)
        if flags & _START:
            cursor.skip(4 + 1, what)  # granularity, flags of the bitmap
        elif flags & _BITS:
            cursor.skip(8 + 4, what)  # first sector, number of sectors
            if not flags & _ZEROES:
                content = cursor.u64(what)
                cursor.skip(content, what)
        if flags & _EOS:
            return
        budget.charge(content, what, cursor)


def _dirty_bitmap_flags(cursor: Cursor, what: str) -> int:
    flags = cursor.u8(what)
    if flags & _MORE_FLAGS:
        flags = flags << 8 | cursor.u8(what)
        if flags & _MORE_FLAGS:
            flags = flags << 16 | cursor.u16(what)
    return flags


_HTAB_ENTRY = 16  # bytes
_HTAB_RUN = struct.Struct(">IHH")  # index, valid entries, invalid entries
_HTAB_NONE = 0xFFFFFFFF


def _spapr_htab(cursor: Cursor, start: bool, budget: ChunkBudget) -> None:
    what = "a spapr/htab section"
    offset = cursor.position
    word = cursor.u32(what)
    if start or word == _HTAB_NONE:
        return
    if word:
        raise SnapshotError(f"{what} sets a table size where runs must follow", offset=offset)
    while True:
        index, valid, invalid = _HTAB_RUN.unpack(cursor.take(_HTAB_RUN.size, what))
        if index == valid == invalid == 0:
            return
        cursor.skip(valid * _HTAB_ENTRY, what)
        budget.charge(valid * _HTAB_ENTRY, what, cursor)


_STORAGE_EOS, _STORAGE_MORE, _STORAGE_DONE = 1, 2, 8
_STORAGE_FLAGS = 0xFFF


def _storage_attributes(cursor: Cursor, start: bool, budget: ChunkBudget) -> None:
    what = "a storage attribute section"
    while True:
        offset, content = cursor.position, 0
        flags = cursor.u64(what) & _STORAGE_FLAGS
        if flags == _STORAGE_EOS:
            return
        if flags == _STORAGE_MORE:
            content = cursor.u64(what)
            cursor.skip(content, what)
        elif flags != _STORAGE_DONE:
            raise SnapshotError(f"{what} has a word with flags {flags:#x}", offset=offset)
        budget.charge(content, what, cursor)


_BODY_READERS: dict[tuple[str, int], BodyReader] = {
    ("dirty-bitmap", 1): _dirty_bitmap,
    ("spapr/htab", 1): _spapr_htab,
    ("s390-storage_attributes", 0): _storage_attributes,
}
