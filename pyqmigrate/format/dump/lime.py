"""The LiME format of memory: ranges of addresses, each after a header of 32 bytes.

::

    u32 0x4C694D45, u32 version 1, u64 first address, u64 last address, 8 bytes reserved; the bytes

All little-endian; the last address is inclusive. Ranges follow each other without gaps, in order of
address.
"""

from __future__ import annotations

import struct

from pyqmigrate.errors import SnapshotError

__all__ = ["HEADER_LENGTH", "decode_header", "encode_header"]

_HEADER = struct.Struct("<IIQQ8x")
HEADER_LENGTH = _HEADER.size

_MAGIC = 0x4C694D45
_VERSION = 1


def encode_header(address: int, length: int) -> bytes:
    """Return the header of ``length`` bytes (at least one) from guest-physical ``address`` on."""
    return _HEADER.pack(_MAGIC, _VERSION, address, address + length - 1)


def decode_header(data: bytes) -> tuple[int, int]:
    """Return address and length. Raises SnapshotError for bytes that are not a header."""
    if len(data) < HEADER_LENGTH:
        raise SnapshotError("the file ends within the header of a range")
    magic, version, first, last = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or last < first:
        raise SnapshotError("this is not a header of LiME version 1")
    return first, last - first + 1
