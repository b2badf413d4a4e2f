"""PNG images: how they are encoded, and the mark by which this package recognises its own.

The mark is a chunk ``tEXt``, keyword ``Software``, right after the header (PNG specification, 11.3.3), so that
it is in the first 64 bytes of the file.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

__all__ = ["encode_png", "is_marked", "mark"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_END = len(_SIGNATURE) + 25  # IHDR has 13 bytes, a length, a type and a checksum


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_MARK = _chunk(b"tEXt", b"Software\0pyqmigrate")


def encode_png(rows: Sequence[bytes], width: int) -> bytes:
    """Return a PNG of ``width`` pixels of red, green and blue, without the mark."""
    head = struct.pack(">IIBBBBB", width, len(rows), 8, 2, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    chunks = _chunk(b"IHDR", head), _chunk(b"IDAT", body), _chunk(b"IEND", b"")
    return _SIGNATURE + b"".join(chunks)


def mark(image: bytes) -> bytes:
    """Return a PNG with the mark. ValueError if it is not a PNG."""
    if not image.startswith(_SIGNATURE) or image[12:16] != b"IHDR":
        raise ValueError("the image is not a PNG")
    return image[:_HEADER_END] + _MARK + image[_HEADER_END:]


def is_marked(head: bytes) -> bool:
    """Return whether a file with these first 64 bytes is a PNG of this package."""
    return head.startswith(_SIGNATURE) and head[_HEADER_END:64] == _MARK
