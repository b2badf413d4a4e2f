"""Bounded reading of untrusted bytes.

A :class:`Cursor` moves through a :class:`ByteSource`. It never reads more than a window of bytes
beyond those that a caller asks for, never reads past the end, and names in its errors the thing that
it was reading and the offset. All numbers are big-endian, as everywhere in the framing.
"""

from __future__ import annotations

from typing import Protocol

from pyqmigrate.errors import SnapshotTruncated

__all__ = ["ByteSource", "Cursor"]

_WINDOW = 4096  # bytes read ahead; small, because block headers are far apart


class ByteSource(Protocol):
    """A source of bytes with positional reads: a file, a buffer."""

    @property
    def size(self) -> int:
        """Length in bytes."""
        ...

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from absolute ``offset``; fewer only at the end."""
        ...


class Cursor:
    """A position in a source, and reads that move it.

    ``what`` in each method names the thing being read, for the error's message. Every read
    raises :class:`SnapshotTruncated` if the source ends first.
    """

    def __init__(self, source: ByteSource, position: int) -> None:
        self._source = source
        self._start = 0
        self._window = b""
        self.size = source.size
        self.position = position

    def take(self, length: int, what: str) -> bytes:
        """Return the next ``length`` bytes; the caller has bounded ``length``."""
        offset = self.position
        begin = offset - self._start
        data = self._window[begin : begin + length] if begin >= 0 else b""
        if len(data) < length:
            data = self._peek(offset, length)
            if len(data) < length:
                raise _cut(what, offset)
        self.position = offset + length
        return data

    def peek(self, length: int) -> bytes:
        """Return up to ``length`` bytes, fewer at the end, without moving."""
        return self._peek(self.position, length)

    def skip(self, length: int, what: str) -> None:
        """Move forward over ``length`` bytes that must be in the file."""
        if length > self.size - self.position:
            raise _cut(what, self.position)
        self.position += length

    def u8(self, what: str) -> int:
        return self.take(1, what)[0]

    def u16(self, what: str) -> int:
        return int.from_bytes(self.take(2, what), "big")

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "big")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "big")

    def text(self, what: str) -> str:
        """Return a string that is stored as one length byte and the bytes."""
        return self.take(self.u8(what), what).decode("utf-8", "surrogateescape")

    def _peek(self, offset: int, length: int) -> bytes:
        begin = offset - self._start
        if begin < 0 or begin + length > len(self._window):
            wanted = min(max(length, _WINDOW), self.size - offset)
            self._window = self._source.read_at(offset, wanted) if wanted > 0 else b""
            self._start, begin = offset, 0
        return self._window[begin : begin + length]


def _cut(what: str, offset: int) -> SnapshotTruncated:
    return SnapshotTruncated(
        f"the file ends inside {what}: it was cut short, or the save did not finish", offset=offset
    )
