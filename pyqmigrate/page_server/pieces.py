"""A file that is compared with its seal while it is read: nothing that does not fit gets out.

A seal has a digest for each MiB. A MiB is read and compared as a whole, and kept for the reads that follow.
"""

from __future__ import annotations

import collections
import os
import threading

from pyqmigrate.errors import SnapshotError, SnapshotTruncated, target_error
from pyqmigrate.format.digest import DIGEST_SIZE, digester
from pyqmigrate.format.postcopy.records import RecordData
from pyqmigrate.format.seal import PIECE
from pyqmigrate.integrity.manifest import Manifest
from pyqmigrate.page_server.sources import ReadAt

__all__ = ["OpenFile", "SealedFile"]

_KEPT = 64  # MiB of a file that stay in memory


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
    """A file and its seal. Raises SnapshotError if they have different sizes."""

    def __init__(self, file: OpenFile, size: int, manifest: Manifest) -> None:
        if manifest.size != size:
            raise SnapshotError(
                f"{file.name!r} is not as it was sealed: it has {size} bytes, and had {manifest.size}; "
                "verify it, and remove the seal if the file is right"
            )
        self.name = file.name
        self._file = file
        self._size = size
        self._manifest = manifest
        self._digest = digester(manifest.algorithm)
        self._lock = threading.Lock()
        self._pieces: collections.OrderedDict[int, bytes] = collections.OrderedDict()

    def read_at(self, offset: int, length: int) -> RecordData:
        first, last = offset // PIECE, (offset + length - 1) // PIECE
        if first == last:
            start = offset - first * PIECE
            return memoryview(self._piece(first))[start : start + length]
        whole = b"".join(self._piece(number) for number in range(first, last + 1))
        return memoryview(whole)[offset - first * PIECE :][:length]

    def check(self, offset: int, end: int) -> None:
        """Compare the bytes ``[offset, end)`` with the seal."""
        for number in range(offset // PIECE, -(-end // PIECE)):
            self._piece(number)

    def _piece(self, number: int) -> bytes:
        with self._lock:
            data = self._pieces.get(number)
            if data is not None:
                self._pieces.move_to_end(number)
                return data
        start = number * PIECE
        data = self._file.read_at(start, min(PIECE, self._size - start))
        expected = self._manifest.digests[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE]
        if self._digest(data) != bytes(expected):
            raise SnapshotError(
                f"{self.name!r} is not as it was sealed, in its MiB {number}", offset=start
            )
        with self._lock:
            self._pieces[number] = data
            while len(self._pieces) > _KEPT:
                self._pieces.popitem(last=False)
        return data
