"""VMCOREINFO: a Linux kernel's description of itself, for readers of a memory dump.

The kernel keeps it in memory as an ELF note, at the start of a page: its name, type 0, and lines of
text, ``KEY=VALUE``, the first of them OSRELEASE. drgn refuses dumps without it; crash and volatility3
use it.
"""

from __future__ import annotations

import struct

__all__ = ["HEAD_LENGTH", "NAME", "NOTE_MAX", "head_pattern", "note_length"]

NAME = "VMCOREINFO"
_PADDED = b"VMCOREINFO\0\0"
_NAME_LENGTH = len(NAME) + 1
_FIRST = b"OSRELEASE="
HEAD_LENGTH = 12 + len(_PADDED) + len(_FIRST)
_LENGTH_MAX = (64 << 10) - 1  # it is less than a page of Linux, of those that it may have
NOTE_MAX = 12 + len(_PADDED) + _LENGTH_MAX + 1


def head_pattern(*, big_endian: bool = False) -> tuple[bytes, bytes]:
    """Return the first HEAD_LENGTH bytes of the note, and a mask of the bits that never vary: all but
    those of its length, which is less than 64 KiB."""
    order = ">III" if big_endian else "<III"
    head = struct.pack(order, _NAME_LENGTH, 0, 0) + _PADDED + _FIRST
    mask = struct.pack(order, 0xFFFFFFFF, 0xFFFF0000, 0xFFFFFFFF)
    return head, mask.ljust(HEAD_LENGTH, b"\xff")


def note_length(head: bytes, *, big_endian: bool = False) -> int | None:
    """Return the length in bytes of the note that starts with these HEAD_LENGTH bytes, or None."""
    if len(head) < HEAD_LENGTH:
        return None
    name, length, kind = struct.unpack_from(">III" if big_endian else "<III", head)
    if name != _NAME_LENGTH or kind != 0 or not len(_FIRST) <= length <= _LENGTH_MAX:
        return None
    if head[12:HEAD_LENGTH] != _PADDED + _FIRST:
        return None
    return 12 + len(_PADDED) + (int(length) + 3) // 4 * 4
