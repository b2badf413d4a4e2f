"""A file that is compared with its seal while it is read: nothing that does not fit gets out.

A seal has a digest for each MiB. A MiB is read and compared as a whole when the first bytes of it are read;
later reads of it are compared page by page (:mod:`pyqmigrate.io.checked_pages`).
"""

from __future__ import annotations

import os
import time

from pyqmigrate.errors import SnapshotError, SnapshotTruncated, target_error
from pyqmigrate.format.digest import DIGEST_SIZE, digester
from pyqmigrate.format.postcopy.records import RecordData
from pyqmigrate.format.seal import PIECE
from pyqmigrate.integrity.manifest import Manifest
from pyqmigrate.page_server.sources import ReadAt

__all__ = ["OpenFile", "SealedFile"]

_BAD_FOR = 0.02  # seconds for which a MiB that does not fit is not read again


class OpenFile(ReadAt):
    """A file by its descriptor, which is borrowed. ``name`` is for messages."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name

    def read_at(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self.fd, length, offset)
            while len(data) < length:
                more = os.pread(self.fd, length - len(data), offset + len(data))
                if not more:
                    raise SnapshotTruncated(
                        f"{self.name!r} has become shorter", offset=offset + len(data)
                    )
                data += more
        except OSError as error:
            if isinstance(error, SnapshotError):
                raise
            raise target_error(error, "cannot read", self.name, position=offset) from error
        return data


class SealedFile(ReadAt):
    """A file and its seal; for one thread. Close it.

    Raises SnapshotError if they have different sizes. ``file`` is borrowed.
    """

    def __init__(self, file: OpenFile, size: int, manifest: Manifest) -> None:
        if manifest.size != size:
            raise SnapshotError(
                f"{file.name!r} is not as it was sealed: it has {size} bytes, and had {manifest.size}; "
                "verify it, and remove the seal if the file is right"
            )
        self.name = file.name
        self.file = file
        self.size = size
        self._manifest = manifest
        self._digest = digester(manifest.algorithm)
        from pyqmigrate.io.checked_pages import CheckedPages

        self.checked = CheckedPages(size)
        self._bad: tuple[int, float] = (-1, 0.0)

    def read_at(self, offset: int, length: int) -> RecordData:
        end = offset + length
        first, last = offset // PIECE, (end - 1) // PIECE
        if first == last:
            return self._part(first, offset, end)
        return b"".join(
            self._part(number, max(offset, number * PIECE), min(end, (number + 1) * PIECE))
            for number in range(first, last + 1)
        )

    def check(self, offset: int, end: int) -> None:
        """Compare the bytes ``[offset, end)`` with the seal."""
        for number in range(offset // PIECE, -(-end // PIECE)):
            self._piece(number)

    def close(self) -> None:
        """Free the memory. Idempotent."""
        self.checked.close()

    def _part(self, number: int, offset: int, end: int) -> RecordData:
        """Return bytes ``[offset, end)``, all of MiB ``number``."""
        if not self.checked.pieces[number]:
            data = self._piece(number)
            # Of what is read as a whole, little is read again.
            if end - offset < PIECE // 2:
                self.checked.enter(number, data)
            return memoryview(data)[offset - number * PIECE : end - number * PIECE]
        unit = self.checked.unit
        start = offset - offset % unit
        stop = min(-(-end // unit) * unit, self.size)
        data = self.file.read_at(start, stop - start)
        if not self.checked.fits(start, data):
            self.checked.forget(number)
            raise self._damage(number)
        return memoryview(data)[offset - start : end - start]

    def _piece(self, number: int) -> bytes:
        """Return MiB ``number``, compared with the seal."""
        bad, until = self._bad
        if number == bad and time.monotonic() < until:
            raise self._damage(number)
        start = number * PIECE
        data = self.file.read_at(start, min(PIECE, self.size - start))
        expected = self._manifest.digests[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE]
        if self._digest(data) != bytes(expected):
            # Each of its pages will be asked for in turn.
            self._bad = (number, time.monotonic() + _BAD_FOR)
            raise self._damage(number)
        return data

    def _damage(self, number: int) -> SnapshotError:
        return SnapshotError(
            f"{self.name!r} is not as it was sealed, in its MiB {number}", offset=number * PIECE
        )
