"""VMCOREINFO: what a Linux kernel says of itself, for whoever reads a dump of its memory.

The kernel keeps it ready as a note of an ELF file, at the start of a page: its name, type 0, and
lines of text, ``KEY=VALUE``, the first of them OSRELEASE. drgn takes no dump without it; crash and
volatility3 use it.
"""

from __future__ import annotations

import struct

__all__ = ["HEAD_LENGTH", "NAME", "NOTE_MAX", "first_word", "note_length"]

NAME = "VMCOREINFO"
_PADDED = b"VMCOREINFO\0\0"
_NAME_LENGTH = len(NAME) + 1
_FIRST = b"OSRELEASE="
HEAD_LENGTH = 12 + len(_PADDED) + len(_FIRST)
_LENGTH_MAX = 64 << 10  # a page of Linux, of those that it may have
NOTE_MAX = 12 + len(_PADDED) + _LENGTH_MAX


def first_word(*, big_endian: bool = False) -> bytes:
    """The first four bytes of the note."""
    return struct.pack(">I" if big_endian else "<I", _NAME_LENGTH)


def note_length(head: bytes, *, big_endian: bool = False) -> int | None:
    """How long the note is, in bytes, that starts with these HEAD_LENGTH; None if none does."""
    if len(head) < HEAD_LENGTH:
        return None
    name, length, kind = struct.unpack_from(">III" if big_endian else "<III", head)
    if name != _NAME_LENGTH or kind != 0 or not len(_FIRST) <= length <= _LENGTH_MAX:
        return None
    if head[12:HEAD_LENGTH] != _PADDED + _FIRST:
        return None
    return 12 + len(_PADDED) + (int(length) + 3) // 4 * 4
