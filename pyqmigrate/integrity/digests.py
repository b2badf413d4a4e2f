"""Digests of a file's bytes, one a MiB: taken while they are written, or by reading.

A save with a seal has the core tell what it is about to write (``struct qm_file`` in
``csrc/qmigrate.h``): every page has been copied into a buffer of ours by then, which is digested
and handed to the kernel, so a digest is of the bytes as written whatever becomes of guest memory
meanwhile. A piece that is written otherwise, in parts or again, is not known any more, and is read
back when all is written.

Reading takes nothing from holes. The page cache is read where the file is in it, and gone past
where it is not.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence

from pyqmigrate.core import Channel, File
from pyqmigrate.errors import SnapshotError, TargetError
from pyqmigrate.format.digest import DIGEST_SIZE, Algorithm, digester, zero_digest
from pyqmigrate.format.seal import PIECE, SealHead, count_pieces
from pyqmigrate.format.stream.mapped_ram import BlockLayout, ByteOrder
from pyqmigrate.integrity.manifest import Manifest
from pyqmigrate.io.channels import Channels, Range
from pyqmigrate.io.direct_io import Direct, DirectIO
from pyqmigrate.io.holes import next_data
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.page_cache import cached_bytes

__all__ = ["Digests", "open_direct"]

_PIECES_A_RANGE = 64  # a channel reads on where it read before: disks like that
_COMPARED_AT_ONCE = 1 << 20  # bytes of a table, whole digests
_CACHED = 0.5  # share of the file in the page cache from which direct I/O only costs


class Digests:
    """The digests of a file's pieces, as far as they are known. Costs 17 bytes a MiB.

    ``size`` is the file's, ``bytes_read`` what was not in holes or known before, both in bytes.
    ``overlay`` lists ``(position, bytes)`` that reading finds there, outside of holes: what is
    written last of all.
    Its methods are for one thread at a time, but for what channels do in :meth:`read_rest`, and
    while a save writes.
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
        """The file has ``size`` bytes; what it had beyond is forgotten."""
        if size == self.size:
            return
        old, new = count_pieces(self.size), count_pieces(size)
        self.forget(min(self.size, size), PIECE)  # a last piece that was, or becomes, shorter
        for table, width in ((self._table, DIGEST_SIZE), (self._known, 1)):
            del table[new * width :]
            table.extend(bytes((max(new, old) - old) * width))
        self.size = size

    def forget(self, at: int, length: int) -> None:
        """What stands at ``[at, at + length)`` is not known any more."""
        first = at // PIECE
        end = min(count_pieces(at + length), len(self._known))
        if first < end:
            self._known[first:end] = bytes(end - first)

    def watch(self, file: File) -> None:
        """Digest what the core writes to ``file``, which has only holes so far."""
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
        """All digests, which must be known, as a manifest; arguments as its head has them."""
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
        """Find the digests that are not known; ``fd`` is a description of our own.

        The file has the size given to :meth:`resize`. Raises SnapshotError when it has become
        shorter, TargetError when it cannot be read, Cancelled.
        """
        local = threading.local()

        def read(_: Channel, item: Range) -> int:
            if not hasattr(local, "buffer"):
                memory = mmap.mmap(-1, PIECE)
                memory.madvise(mmap.MADV_DONTFORK)  # a child would split it from what is read
                with contextlib.suppress(OSError):  # not every kernel has huge pages
                    memory.madvise(mmap.MADV_HUGEPAGE)
                local.buffer = memoryview(memory)
            for number in range(item.first, item.first + item.npages):
                if channels.cancelled:
                    return -errno.ECANCELED
                at = number * PIECE
                view = local.buffer[: min(PIECE, self.size - at)]
                _read(fd, direct, local.buffer, len(view), at, name)
                self._lay_over(view, at)
                self._set(number, view)
                channels.core.count_pages(len(view))
            return 0

        channels.run(self._unknown(fd, channels), read, name, [""])

    def _unknown(self, fd: int, channels: Channels) -> Iterator[Range]:
        """Stretches of pieces to be read; those that are holes become known on the way."""
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
        """The first piece from ``number`` on that may hold data, at most ``end``."""
        limit = min(end * PIECE, self.size)
        at = next_data(fd, number * PIECE, limit)
        return end if at == limit else at // PIECE

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

    def _lay_over(self, view: memoryview, at: int) -> None:
        for position, data in self._overlay:
            for n in range(len(data)):
                if at <= position + n < at + len(view):
                    view[position + n - at] = data[n]

    def _writing(self, at: int, data: memoryview | None, length: int) -> None:
        if data is None or at % PIECE:
            self.forget(at, length)
            return
        for start in range(0, length, PIECE):
            if length - start < PIECE:  # the rest of the piece is another's
                self.forget(at + start, length - start)
            else:
                self._set((at + start) // PIECE, data[start : start + PIECE])


def open_direct(source: InputFile, setting: DirectIO) -> tuple[Direct | None, str]:
    """How a file is best read as it is now: a direct descriptor or none, and why.

    Give the descriptor to ``source.close_direct``. Raises DirectIORefused where it is demanded and
    cannot be had.
    """
    if setting is DirectIO.AUTO:
        cached = cached_bytes(source.fd) / max(source.allocated_bytes(), 1)
        if cached >= _CACHED:
            return None, f"{min(cached, 1):.0%} of the file is in the page cache"
    return source.open_direct(setting)


def _read(
    fd: int, direct: Direct | None, buffer: memoryview, length: int, at: int, name: str
) -> None:
    """``length`` bytes at ``at`` to the front of ``buffer``, which has whole units."""
    have = 0
    while have < length:
        try:
            if direct is not None and have % direct.off_align == 0:
                end = -(-length // direct.off_align) * direct.off_align
                got = os.preadv(direct.fd, [buffer[have:end]], at + have)
            else:
                got = os.preadv(fd, [buffer[have:length]], at + have)
        except OSError as error:
            raise TargetError(
                error.errno or errno.EIO, "cannot read", name, position=at + have
            ) from error
        if got == 0:
            raise SnapshotError("the file has become shorter", offset=at + have)
        have += got
