"""Zstandard's seekable form: frames that can be decompressed one by one, and a table of them.

The format is that of ``contrib/seekable_format/zstd_seekable_compression_format.md`` in zstd's
repository. A decompressor that does not know it steps over the table, which is the last frame of the
file, one that is skipped::

    u32 0x184D2A5E, u32 length              of all that follows
    entry for each frame before it, in order:
        u32 compressed size, u32 decompressed size (0: a frame that is skipped), [u32 checksum]
    u32 number of entries, u8 descriptor, u32 0x8F92EAB1

All numbers are little-endian. Bit 7 of the descriptor: there are checksums, the lower half of the
XXH64 (seed 0) of the decompressed bytes. Bits 2 to 6 are zero.
"""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from pyqmigrate.errors import NotSupported, SnapshotError

__all__ = [
    "FOOTER_SIZE",
    "FRAME_MAX",
    "Footer",
    "SeekTable",
    "decode_skippable",
    "encode_skippable",
    "encode_table",
]

FRAME_MAX = 16 << 20  # decompressed bytes of a frame that are read here
FRAMES_MAX = 0x8000000  # of the format
_SKIPPABLE = struct.Struct("<II")
_TABLE = 0x184D2A5E
_FOOTER = struct.Struct("<IBI")
_MAGIC = 0x8F92EAB1
_CHECKSUMS = 0x80
_RESERVED = 0x7C
FOOTER_SIZE = _FOOTER.size


@dataclass(frozen=True)
class Footer:
    """The last 9 bytes of a file. ``start`` is the file offset of the table's frame, ``length`` the
    size of that frame, both in bytes; ``checksums``: whether entries have one."""

    entries: int
    checksums: bool
    start: int
    length: int

    @classmethod
    def decode(cls, data: bytes, size: int) -> Footer:
        """Decode the end of a file of ``size`` bytes. Raises SnapshotError if it has no table."""
        if len(data) < FOOTER_SIZE:
            raise _fault("the file is too short for a seek table", 0)
        entries, descriptor, magic = _FOOTER.unpack(data[-FOOTER_SIZE:])
        if magic != _MAGIC:
            raise _fault("the file does not end with a seek table", size - 4)
        if descriptor & _RESERVED:
            raise _fault(f"unknown descriptor {descriptor:#x}", size - 5)
        if entries > FRAMES_MAX:
            raise _fault(f"{entries} frames; at most {FRAMES_MAX} are possible", size - 9)
        checksums = bool(descriptor & _CHECKSUMS)
        length = _SKIPPABLE.size + entries * (12 if checksums else 8) + FOOTER_SIZE
        if length > size:
            raise _fault(f"{entries} frames do not fit into {size} bytes", size - 9)
        return cls(entries, checksums, size - length, length)


@dataclass(frozen=True)
class SeekTable:
    """Where frames are. Frame k is at ``[offsets[k], offsets[k + 1])`` of the file, and has the bytes
    ``[positions[k], positions[k + 1])`` of the content. ``checksums`` is None if there are none."""

    offsets: Sequence[int]
    positions: Sequence[int]
    checksums: Sequence[int] | None

    @property
    def frames(self) -> int:
        return len(self.offsets) - 1

    @property
    def size(self) -> int:
        """The size of the content, bytes."""
        return self.positions[-1]

    def frame_at(self, position: int) -> int:
        """Return the number of the frame with this byte of the content."""
        return bisect_right(self.positions, position) - 1

    @classmethod
    def decode(cls, frame: bytes, footer: Footer) -> SeekTable:
        """Decode the table's frame, of ``footer.length`` bytes.

        Raises SnapshotError unless the frames fill the file before it, NotSupported for frames that
        are larger than :data:`FRAME_MAX`.
        """
        if len(frame) != footer.length:
            raise _fault("the seek table is cut off", footer.start)
        magic, length = _SKIPPABLE.unpack_from(frame)
        if magic != _TABLE or length != footer.length - _SKIPPABLE.size:
            raise _fault("the seek table does not start where it should", footer.start)
        words = _words(frame[_SKIPPABLE.size : -FOOTER_SIZE])
        step = 3 if footer.checksums else 2
        compressed, decompressed = words[0::step], words[1::step]
        if max(decompressed, default=0) > FRAME_MAX:
            raise NotSupported(
                f"a compact file with frames of {max(decompressed) >> 20} MiB; {FRAME_MAX >> 20} MiB "
                "are possible: decompress it with zstd -d"
            )
        offsets = array("Q", accumulate(compressed, initial=0))
        if offsets[-1] != footer.start:
            raise _fault(
                f"the frames have {offsets[-1]} bytes, and there are {footer.start}", footer.start
            )
        positions = array("Q", accumulate(decompressed, initial=0))
        return cls(offsets, positions, words[2::3] if footer.checksums else None)


def encode_table(frames: Sequence[tuple[int, int, int]]) -> bytes:
    """Return the table's frame. Each of ``frames``: compressed size, decompressed size, checksum."""
    content = b"".join(struct.pack("<III", *frame) for frame in frames)
    content += _FOOTER.pack(len(frames), _CHECKSUMS, _MAGIC)
    return _SKIPPABLE.pack(_TABLE, len(content)) + content


def encode_skippable(number: int, content: bytes) -> bytes:
    """Return a frame that decompressors step over; ``number`` is 0 to 15."""
    return _SKIPPABLE.pack(0x184D2A50 + number, len(content)) + content


def decode_skippable(number: int, frame: bytes) -> bytes | None:
    """Return the content of such a frame; None if this is another one."""
    if len(frame) < _SKIPPABLE.size:
        return None
    magic, length = _SKIPPABLE.unpack_from(frame)
    if magic != 0x184D2A50 + number or length != len(frame) - _SKIPPABLE.size:
        return None
    return frame[_SKIPPABLE.size :]


def _words(data: bytes) -> array[int]:
    words = array("I", data)
    if sys.byteorder != "little":
        words.byteswap()
    return words


def _fault(message: str, offset: int) -> SnapshotError:
    return SnapshotError(message, offset=offset, field="seek table")
