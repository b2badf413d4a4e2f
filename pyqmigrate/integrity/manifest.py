"""The file of a seal: where it is, reading it with checks, writing it all at once."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.errors import SnapshotError, TargetError
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.format.seal import HEAD_MAX, SealHead, SealLine
from pyqmigrate.io.holes import next_hole
from pyqmigrate.io.own_files import check_replaceable, remove, write_whole
from pyqmigrate.io.place import seal_path, sync_directory
from pyqmigrate.io.seal_file import SEAL

__all__ = [
    "Manifest",
    "check_place",
    "read_manifest",
    "remove_manifest",
    "seal_path",
    "write_manifest",
]

_WINDOW = 1 << 20  # bytes read at a time
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class Manifest:
    """A seal: its head, and the digests of the file's pieces one after another."""

    head: SealHead
    digests: bytes | bytearray

    @property
    def algorithm(self) -> Algorithm:
        return self.head.algorithm

    @property
    def size(self) -> int:
        """Bytes of the file when it was sealed."""
        return self.head.size

    @property
    def clear_pages_zero(self) -> bool:
        """Whether pages whose bit is clear read as zeros in the file."""
        return self.head.clear_pages_zero


def read_manifest(
    path: Path, limit: int | None = None, *, wanted: Callable[[SealHead], bool] | None = None
) -> Manifest | None:
    """The manifest at ``path``; None where there is no file.

    limit: bytes of digests that are kept, no more than so many take memory; all are checked. A
        head may claim a file of any size: who has the file gives what that can need.
    wanted: asked about the head before a digest is read, when nothing vouches for it yet; where
        it says no, that is None too.

    Raises SnapshotError (its ``field`` is ``seal``) unless it is whole, NotSupported where its
    algorithm is not installed, TargetError.
    """
    try:
        # O_NONBLOCK: to open a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise TargetError(error.errno or errno.EIO, "cannot open the seal", path) from error
    try:
        return _read(fd, limit, wanted)
    except OSError as error:
        raise TargetError(error.errno or errno.EIO, "cannot read the seal", path) from error
    finally:
        os.close(fd)


def _read(fd: int, limit: int | None, wanted: Callable[[SealHead], bool] | None) -> Manifest | None:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise SnapshotError("the seal is not a regular file", field="seal")
    text, newline, _ = os.pread(fd, HEAD_MAX, 0).partition(b"\n")
    line = SealLine.decode(text + newline)
    head, start = line.head, len(text) + len(newline)
    if info.st_size != start + head.digests_size:
        raise SnapshotError(
            f"the seal has {info.st_size} bytes, and {start + head.digests_size} by its head",
            field="seal",
        )
    if wanted is not None and not wanted(head):
        return None
    # A file of a few bytes can claim any size by a hole. No digest is zeros, so none is in a hole.
    if next_hole(fd, 0, info.st_size) < info.st_size:
        raise SnapshotError("the seal has a hole in its digests", field="seal")
    kept = bytearray(head.digests_size if limit is None else min(limit, head.digests_size))

    def digests() -> Iterator[bytes]:
        at = start
        while piece := os.pread(fd, _WINDOW, at):
            room = kept[at - start : at - start + len(piece)]
            kept[at - start : at - start + len(room)] = piece[: len(room)]
            at += len(piece)
            yield piece

    line.check(digests())
    return Manifest(head, kept)


def check_place(path: Path) -> Path:
    """Where a seal is to be written; UsageError where something else is there, or its name would be
    too long. Raises TargetError."""
    return check_replaceable(path, SEAL)


def remove_manifest(path: Path) -> None:
    """Remove the seal at ``path``, if one of ours is there, and make that durable. OSError."""
    if remove(os.fspath(path), SEAL):
        sync_directory(path)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write it beside its file; it has its name when it is whole and durable.

    Raises UsageError where something else has that name, TargetError (NotDurable).
    """
    line = manifest.head.encode(manifest.digests)
    write_whole(path, SEAL, lambda file: file.writelines((line, manifest.digests)))
