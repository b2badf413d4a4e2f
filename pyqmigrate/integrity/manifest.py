"""The file of a seal: find it, read it with checks, write it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.errors import SnapshotError, target_error
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.format.seal import HEAD_MAX, SealHead, SealLine
from pyqmigrate.io.holes import next_hole
from pyqmigrate.io.own_files import check_replaceable, remove, write_whole
from pyqmigrate.io.place import seal_path, sync_directory
from pyqmigrate.io.seal_file import SEAL

__all__ = [
    "Manifest",
    "check_place",
    "decode_manifest",
    "read_manifest",
    "remove_manifest",
    "seal_path",
    "write_manifest",
]

_WINDOW = 1 << 20  # bytes read at a time
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class Manifest:
    """A seal: its head, and the digests of the file's pieces, concatenated."""

    head: SealHead
    digests: bytes | bytearray

    @property
    def algorithm(self) -> Algorithm:
        return self.head.algorithm

    @property
    def size(self) -> int:
        """The size of the file when it was sealed, bytes."""
        return self.head.size

    @property
    def clear_pages_zero(self) -> bool:
        """Whether pages whose bit is clear read as zeros in the file."""
        return self.head.clear_pages_zero


def read_manifest(
    path: Path, limit: int | None = None, *, wanted: Callable[[SealHead], bool] | None = None
) -> Manifest | None:
    """Return the manifest at ``path``; None if there is not a file.

    limit: keep at most so many bytes of digests; all are checked. A head may claim a file of any
        size, so pass the limit that the real size of the file implies.
    wanted: called with the head, which is untrusted then, before the digests are read. If it returns
        False, the result is None.

    Raises SnapshotError (its ``field`` is ``seal``) for a damaged seal, NotSupported if the library
    of its algorithm is missing, TargetError.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise target_error(error, "cannot open the seal", path) from error
    try:
        return _read(fd, limit, wanted)
    except OSError as error:
        raise target_error(error, "cannot read the seal", path) from error
    finally:
        os.close(fd)


def decode_manifest(data: bytes, limit: int | None = None) -> Manifest:
    """Return the manifest in the bytes of a seal; arguments and errors are those of
    :func:`read_manifest`."""
    start = data.find(b"\n", 0, HEAD_MAX) + 1
    line = SealLine.decode(data[:start])
    digests = memoryview(data)[start:]
    if len(digests) != line.head.digests_size:
        raise SnapshotError(
            f"the seal has {len(data)} bytes, but its head requires {start + line.head.digests_size}",
            field="seal",
        )
    line.check([digests])
    return Manifest(line.head, bytes(digests[:limit]))


def _read(fd: int, limit: int | None, wanted: Callable[[SealHead], bool] | None) -> Manifest | None:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise SnapshotError("the seal is not a regular file", field="seal")
    text, newline, _ = os.pread(fd, HEAD_MAX, 0).partition(b"\n")
    line = SealLine.decode(text + newline)
    head, start = line.head, len(text) + len(newline)
    if info.st_size != start + head.digests_size:
        raise SnapshotError(
            f"the seal has {info.st_size} bytes, but its head requires {start + head.digests_size}",
            field="seal",
        )
    if wanted is not None and not wanted(head):
        return None
    # With a hole, a file of a few bytes can have any size. Digests are never zeros.
    if next_hole(fd, 0, info.st_size) < info.st_size:
        raise SnapshotError("the seal has a hole in its digests", field="seal")
    kept = bytearray(head.digests_size if limit is None else min(limit, head.digests_size))

    def digests() -> Iterator[bytes]:
        offset = 0
        while piece := os.pread(fd, _WINDOW, start + offset):
            room = kept[offset : offset + len(piece)]
            kept[offset : offset + len(room)] = piece[: len(room)]
            offset += len(piece)
            yield piece

    line.check(digests())
    return Manifest(head, kept)


def check_place(path: Path) -> Path:
    """Return the path of a seal to write. Raises UsageError if another kind of file is there, or its
    name would be too long, and TargetError."""
    return check_replaceable(path, SEAL)


def remove_manifest(path: Path) -> None:
    """Remove the seal at ``path``, durably. Another kind of file stays. OSError."""
    if remove(os.fspath(path), SEAL):
        sync_directory(path)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a seal; the file gets its name when it is complete and durable.

    Raises UsageError if another kind of file has the name, TargetError (NotDurable).
    """
    line = manifest.head.encode(manifest.digests)
    write_whole(path, SEAL, lambda file: file.writelines((line, manifest.digests)))
