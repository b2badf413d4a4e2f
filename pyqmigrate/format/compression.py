"""Compression of a whole stream, recognized by the first bytes.

QEMU's documentation saves with ``migrate "exec:gzip -c > FILE"``; libvirt compresses the stream in
a save image. Both leave an ordinary file of the compressor.
"""

from __future__ import annotations

import enum

__all__ = ["MAGIC_MAX", "Compression"]


class Compression(enum.StrEnum):
    """A compressor, by the name of its command."""

    GZIP = "gzip"
    BZIP2 = "bzip2"
    XZ = "xz"
    ZSTD = "zstd"
    LZOP = "lzop"
    LZ4 = "lz4"

    @classmethod
    def of(cls, head: bytes) -> Compression | None:
        """Return the compressor whose files begin with these bytes, or None."""
        return next((kind for kind, magics in _MAGICS.items() if head.startswith(magics)), None)


# A block header follows at once in bzip2: its four bytes of magic are also a word of text.
_MAGICS = {
    Compression.GZIP: (b"\x1f\x8b\x08",),
    Compression.BZIP2: tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)),
    Compression.XZ: (b"\xfd7zXZ\0",),
    # Frames with content, and frames that are skipped (pzstd begins with one).
    Compression.ZSTD: (b"\x28\xb5\x2f\xfd", *(bytes([n, 0x2A, 0x4D, 0x18]) for n in range(80, 96))),
    Compression.LZOP: (b"\x89LZO\0\r\n\x1a\n",),
    Compression.LZ4: (b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18"),
}
MAGIC_MAX = max(len(magic) for magics in _MAGICS.values() for magic in magics)
