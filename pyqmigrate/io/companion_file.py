"""Page tables and working sets beside a snapshot: their paths, reading and writing.

:mod:`pyqmigrate.format.snapshot_companion` describes their format.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pyqmigrate.errors import SnapshotError, TargetError, target_error
from pyqmigrate.format.digest import Data
from pyqmigrate.format.seal import HEAD_MAX, SealLine
from pyqmigrate.format.snapshot_companion import LINE_MAX, CompanionKind
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.io.holes import next_hole
from pyqmigrate.io.own_files import FileKind, write_whole
from pyqmigrate.io.place import resolve_symlink, seal_path

__all__ = [
    "companion_path",
    "identify_snapshot",
    "open_companion",
    "read_pieces",
    "write_companion",
]

_PIECE = 1 << 20  # bytes read at a time
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def companion_path(snapshot: str | os.PathLike[str], suffix: str) -> Path:
    """Return where a file beside ``snapshot`` is, an absolute path: if it is a link, beside its target."""
    path = resolve_symlink(snapshot)
    return path.with_name(path.name + suffix)


def identify_snapshot(snapshot: str | os.PathLike[str], fd: int) -> SnapshotId:
    """Return the identity of a snapshot that is open as ``fd``; its seal is included if it matches the
    size and modification time of the file. Raises OSError where the descriptor cannot be looked at."""
    info = os.fstat(fd)
    seal: bytes | None = None
    with contextlib.suppress(OSError, SnapshotError):
        line = _read_seal_line(seal_path(snapshot))
        if (line.head.size, line.head.mtime_ns) == (info.st_size, info.st_mtime_ns):
            seal = line.digest
    return SnapshotId(info.st_size, info.st_mtime_ns, seal)


def _read_seal_line(path: Path) -> SealLine:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        text, newline, _ = os.pread(fd, HEAD_MAX, 0).partition(b"\n")
    finally:
        os.close(fd)
    return SealLine.decode(text + newline)


@contextlib.contextmanager
def open_companion(path: Path, kind: CompanionKind) -> Iterator[tuple[int, bytes] | None]:
    """Yield a descriptor of the file and its first bytes, enough for its line; None where there is no
    file. Raises SnapshotError unless it is a regular file without holes, TargetError."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _ABSENT:
            yield None
            return
        raise target_error(error, f"cannot open the {kind.noun}", path) from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise kind.fault("not a regular file")
        # With a hole, a file of a few bytes can have any size.
        if next_hole(fd, 0, info.st_size) < info.st_size:
            raise kind.fault("unexpected hole")
        yield fd, os.pread(fd, LINE_MAX, 0)
    except TargetError:
        raise
    except OSError as error:
        raise target_error(error, f"cannot read the {kind.noun}", path) from error
    finally:
        os.close(fd)


def read_pieces(fd: int, kind: CompanionKind, start: int, length: int) -> Iterator[bytes]:
    """Yield the body, ``length`` bytes from ``start`` to the end of the file. Raises SnapshotError
    where there are more or fewer, OSError."""
    size = os.fstat(fd).st_size
    if size != start + length:
        raise kind.fault(f"{size} bytes, expected {start + length} by the first line")
    offset = start
    while offset < start + length:
        piece = os.pread(fd, min(_PIECE, start + length - offset), offset)
        if not piece:
            raise kind.fault("the file became shorter", offset)
        offset += len(piece)
        yield piece


def write_companion(
    place: Path, kind: FileKind, line: bytes, body: Iterable[Data], *, sync_name: bool = True
) -> None:
    """Write the file, as :func:`~pyqmigrate.io.own_files.write_whole` does and raising the same."""

    def write(out: BinaryIO) -> None:
        out.write(line)
        out.writelines(body)

    write_whole(place, kind, write, sync_name=sync_name)
