"""Digests of a file, one for each MiB: of the bytes as they are written, or by reading them.

In a save with a seal the core calls a hook before each write (``struct qm_file`` in
``csrc/qmigrate.h``). Every page was copied into a bounce buffer by then, which is digested and
written, so the digests match the file even if guest memory changes. The digest of a piece that is
written in parts or again is dropped, and the piece is read when everything is written.

Holes are not read. Pieces in the page cache are read from there, others with direct I/O.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from pyqmigrate.core import Channel, File
from pyqmigrate.errors import SnapshotError, target_error
from pyqmigrate.format.digest import DIGEST_SIZE, Algorithm, digester, zero_digest
from pyqmigrate.format.seal import PIECE, SealHead, count_pieces
from pyqmigrate.format.stream.mapped_ram import BlockLayout, ByteOrder
from pyqmigrate.integrity.manifest import Manifest
from pyqmigrate.io.channels import Channels, Range
from pyqmigrate.io.direct_io import Direct, DirectIO
from pyqmigrate.io.holes import next_data
from pyqmigrate.io.huge_buffer import huge_buffer
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.page_cache import cached_bytes
from pyqmigrate.io.plain_file import PlainFile

__all__ = ["Digests", "open_direct"]

_PIECES_A_RANGE = 64  # so that each channel reads sequentially
_COMPARED_AT_ONCE = 1 << 20  # bytes of a table, whole digests
_CACHED = 0.5  # share of the file in the page cache above which direct I/O is slower


class Digests:
    """The known digests of a file's pieces. They take 17 bytes for each MiB.

    ``size`` is that of the file, ``bytes_read`` counts the bytes that were read, both in bytes.
    ``overlay`` lists ``(position, bytes)``: what is written last of all, as if it were in the file
    already. Methods are for one thread at a time, except for calls made by channel threads.
    """

    def __init__(self, algorithm: Algorithm, *, overlay: Sequence[tuple[int, bytes]] = ()) -> None:
        self.algorithm = algorithm
        self.size = 0
        self.bytes_read = 0
        self._digest = digester(algorithm)
        self._table = bytearray()
        self._known = bytearray()
        self._overlay = overlay

    def resize(self, size: int) -> None:
        """Set the size of the file. Digests beyond it are dropped."""
        if size == self.size:
            return
        old, new = count_pieces(self.size), count_pieces(size)
        self.forget(min(self.size, size), PIECE)  # the length of the last piece changes
        for table, width in ((self._table, DIGEST_SIZE), (self._known, 1)):
            del table[new * width :]
            table.extend(bytes((max(new, old) - old) * width))
        self.size = size

    def forget(self, offset: int, length: int) -> None:
        """Drop the digests of the bytes ``[offset, offset + length)``."""
        first = offset // PIECE
        end = min(count_pieces(offset + length), len(self._known))
        if first < end:
            self._known[first:end] = bytes(end - first)

    def watch(self, file: File) -> None:
        """Digest what the core writes to ``file``, which is a hole so far."""
        file.set_write_hook(self._writing)

    def seal(
        self,
        mtime_ns: int,
        offset: int,
        blocks: tuple[BlockLayout, ...],
        *,
        clear_pages_zero: bool,
        bitmap_order: ByteOrder = "little",
    ) -> Manifest:
        """Return all digests, which must be known, as a manifest. The arguments go into its head."""
        if 0 in self._known:
            raise ValueError(f"the digest of piece {self._known.index(0)} is not known")
        head = SealHead(
            self.algorithm, self.size, mtime_ns, clear_pages_zero, offset, blocks, bitmap_order
        )
        return Manifest(head, bytes(self._table))

    def differing(self, digests: bytes | bytearray) -> Iterator[int]:
        """Yield the numbers of the pieces that both tables have, and whose digests differ."""
        length = min(len(self._table), len(digests))
        for start in range(0, length, _COMPARED_AT_ONCE):
            end = min(start + _COMPARED_AT_ONCE, length)
            if self._table[start:end] == digests[start:end]:
                continue
            for at in range(start, end, DIGEST_SIZE):
                if self._table[at : at + DIGEST_SIZE] != digests[at : at + DIGEST_SIZE]:
                    yield at // DIGEST_SIZE

    def read_rest(
        self, fd: int, name: str, channels: Channels, direct: Direct | None = None
    ) -> None:
        """Read the pieces without a known digest. ``fd`` has its own open file description.

        The file has the size given to :meth:`resize`. Raises SnapshotError if it has become shorter,
        TargetError if it cannot be read, Cancelled.
        """
        local = threading.local()

        def read(_: Channel, item: Range) -> int:
            if not hasattr(local, "buffer"):
                local.buffer = huge_buffer(PIECE)
            for number in range(item.first, item.first + item.npages):
                if channels.cancelled:
                    return -errno.ECANCELED
                offset = number * PIECE
                view = local.buffer[: min(PIECE, self.size - offset)]
                _read(fd, direct, local.buffer, len(view), offset, name)
                self._lay_over(view, offset)
                self._set(number, view)
                channels.core.count_pages(len(view))
            return 0

        channels.run(self._unknown(fd, channels), read, name, [""])

    def read_plain(self, plain: PlainFile, poll: Callable[[], None]) -> None:
        """Read the pieces without a known digest, on this thread; ``poll`` is called before each.

        Raises SnapshotError if the file has become shorter, TargetError.
        """
        for number in range(count_pieces(self.size)):
            if self._known[number]:
                continue
            poll()
            start, end = number * PIECE, min((number + 1) * PIECE, self.size)
            data = plain.next_data(start)
            if data is None or data >= end:
                self._set_zero(number, number + 1)
                continue
            view = memoryview(plain.read(start, end - start)).cast("B")
            if len(view) < end - start:
                raise SnapshotError("the file has become shorter", offset=start + len(view))
            self.bytes_read += len(view)
            self._set(number, view)

    def _unknown(self, fd: int, channels: Channels) -> Iterator[Range]:
        """Yield the ranges of pieces to read. Pieces in holes become known on the way."""
        count = count_pieces(self.size)
        at = self._known.find(0)
        while at >= 0:
            end = self._known.find(1, at)
            end = count if end < 0 else end
            data = self._data(fd, at, end)
            if data > at:
                self._set_zero(at, data)
                channels.core.count_pages((data - at) * PIECE)
            elif data < end:
                stop = at + 1
                while stop < min(end, at + _PIECES_A_RANGE) and self._data(fd, stop, end) == stop:
                    stop += 1
                self.bytes_read += min(stop * PIECE, self.size) - at * PIECE
                yield Range(0, at, stop - at)
                data = stop
            at = self._known.find(0, data)

    def _data(self, fd: int, number: int, end: int) -> int:
        """Return the first piece from ``number`` on that may have data, at most ``end``."""
        limit = min(end * PIECE, self.size)
        offset = next_data(fd, number * PIECE, limit)
        return end if offset == limit else offset // PIECE

    def _set_zero(self, first: int, end: int) -> None:
        self._table[first * DIGEST_SIZE : end * DIGEST_SIZE] = zero_digest(
            self.algorithm, PIECE
        ) * (end - first)
        if end * PIECE > self.size:
            self._table[(end - 1) * DIGEST_SIZE :] = zero_digest(
                self.algorithm, self.size - (end - 1) * PIECE
            )
        self._known[first:end] = b"\1" * (end - first)

    def _set(self, number: int, data: memoryview) -> None:
        self._table[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE] = self._digest(data)
        self._known[number] = 1

    def _lay_over(self, view: memoryview, offset: int) -> None:
        for position, data in self._overlay:
            for n in range(len(data)):
                if offset <= position + n < offset + len(view):
                    view[position + n - offset] = data[n]

    def _writing(self, offset: int, data: memoryview | None, length: int) -> None:
        if data is None or offset % PIECE:
            self.forget(offset, length)
            return
        for start in range(0, length, PIECE):
            if length - start < PIECE:  # another write has the rest of the piece
                self.forget(offset + start, length - start)
            else:
                self._set((offset + start) // PIECE, data[start : start + PIECE])


def open_direct(source: InputFile, setting: DirectIO) -> tuple[Direct | None, str]:
    """Return the faster way to read a file now: a direct descriptor or None, and the reason.

    Give the descriptor to ``source.close_direct``. Raises DirectIORefused if ``setting`` requires it
    and the file does not support it.
    """
    if setting is DirectIO.AUTO:
        cached = cached_bytes(source.fd) / max(source.allocated_bytes(), 1)
        if cached >= _CACHED:
            return None, f"{min(cached, 1):.0%} of the file is in the page cache"
    return source.open_direct(setting)


def _read(
    fd: int, direct: Direct | None, buffer: memoryview, length: int, offset: int, name: str
) -> None:
    """Read ``length`` bytes at ``offset`` into ``buffer``, whose length is a multiple of the unit of
    direct I/O."""
    have = 0
    while have < length:
        try:
            if direct is not None and have % direct.off_align == 0:
                end = -(-length // direct.off_align) * direct.off_align
                got = os.preadv(direct.fd, [buffer[have:end]], offset + have)
            else:
                got = os.preadv(fd, [buffer[have:length]], offset + have)
        except OSError as error:
            raise target_error(error, "cannot read", name, position=offset + have) from error
        if got == 0:
            raise SnapshotError("the file has become shorter", offset=offset + have)
        have += got
