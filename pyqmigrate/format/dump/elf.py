"""The head of an ELF core file of a guest's memory: ELF header, program headers, notes.

Always the 64-bit form, in the guest's byte order. As in QEMU's ``dump-guest-memory``, p_vaddr and
p_paddr are both the guest-physical address::

    0       ELF header, 64 bytes; type CORE
    64      program headers, 56 bytes each: PT_NOTE, then a PT_LOAD for each range
    ...     notes
    ...     the memory
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pyqmigrate.errors import NotSupported

__all__ = ["SEGMENTS_MAX", "Segment", "encode_head", "encode_note", "head_length"]

_IDENT = struct.Struct("4sBBBB8x")
# "<" or ">" goes before these three: the guest's byte order, and no padding of this machine's.
_HEADER = "HHIQQQIHHHHHH"
_PROGRAM_HEADER = "IIQQQQQQ"
_NOTE = "III"
_HEADER_LENGTH, _PROGRAM_HEADER_LENGTH = 64, 56

_MAGIC = b"\x7fELF"
_CLASS_64, _LITTLE, _BIG, _VERSION = 2, 1, 2, 1
_CORE = 4
_LOAD, _NOTES = 1, 4
_READ_WRITE_EXECUTE = 7
_NOTE_ALIGNMENT = 4
# Of memory. crash takes a file that names an alignment, and keeps it, for one of netdump's.
_UNALIGNED = 0
SEGMENTS_MAX = 0xFFFE - 1  # e_phnum has 16 bits, its last value another meaning; one is PT_NOTE's


@dataclass(frozen=True)
class Segment:
    """A range of memory: guest-physical address, position in the file, length; bytes."""

    address: int
    position: int
    length: int


def encode_note(name: str, kind: int, content: bytes, *, big_endian: bool = False) -> bytes:
    """Return a note; ``name`` gets its final zero byte, and both parts are padded to 4 bytes."""
    owner = name.encode("ascii") + b"\0"
    head = struct.pack(_order(big_endian) + _NOTE, len(owner), len(content), kind)
    return head + _padded(owner) + _padded(content)


def head_length(segments: int, notes: int) -> int:
    """Return the length of a head with this many segments and bytes of notes.

    Raises NotSupported for more than SEGMENTS_MAX segments.
    """
    if segments > SEGMENTS_MAX:
        raise NotSupported(f"{segments} ranges of memory; an ELF file has at most {SEGMENTS_MAX}")
    return _HEADER_LENGTH + (1 + segments) * _PROGRAM_HEADER_LENGTH + notes


def encode_head(
    machine: int, segments: Sequence[Segment], notes: bytes, *, big_endian: bool = False
) -> bytes:
    """Return the bytes before the memory.

    ``machine`` is the number of the processor (e_machine); notes are those of :func:`encode_note`.
    Raises the errors of :func:`head_length`.
    """
    order = _order(big_endian)
    notes_at = head_length(len(segments), 0)
    parts = [
        _IDENT.pack(_MAGIC, _CLASS_64, _BIG if big_endian else _LITTLE, _VERSION, 0),
        struct.pack(
            order + _HEADER,
            _CORE,
            machine,
            _VERSION,
            0,
            _HEADER_LENGTH,
            0,
            0,
            _HEADER_LENGTH,
            _PROGRAM_HEADER_LENGTH,
            1 + len(segments),
            0,
            0,
            0,
        ),
        struct.pack(
            order + _PROGRAM_HEADER,
            _NOTES,
            0,
            notes_at,
            0,
            0,
            len(notes),
            len(notes),
            _NOTE_ALIGNMENT,
        ),
    ]
    parts += [
        struct.pack(
            order + _PROGRAM_HEADER,
            _LOAD,
            _READ_WRITE_EXECUTE,
            segment.position,
            segment.address,
            segment.address,
            segment.length,
            segment.length,
            _UNALIGNED,
        )
        for segment in segments
    ]
    return b"".join([*parts, notes])


def _order(big_endian: bool) -> str:
    return ">" if big_endian else "<"


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _NOTE_ALIGNMENT)
