"""A view that is a copy: for systems on which nothing can be mounted.

The snapshot is copied into a directory of this process, sparse, with what belongs to it beside it. The
directory is removed when the view is closed; a QEMU that has the file open keeps it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from pyqmigrate.errors import NotSupported, SnapshotTruncated, TargetError, target_error
from pyqmigrate.io.plain_file import PlainFile

__all__ = ["CopiedView"]

_PIECE = 8 << 20  # bytes read at a time
_DIRECTORY = "/var/tmp"  # /tmp may be memory


class CopiedView:
    """A copy of ``file`` under ``name``, a :class:`~pyqmigrate.io.view.View`.

    ``file`` is borrowed for the call. ``ranges`` is what is copied, each a start and an end, in order; None
    is all of it. Raises TargetError if it cannot be read, or not be copied
    (NoSpace), SnapshotTruncated if it ends early.
    """

    pushes = False

    def __init__(
        self, file: PlainFile, name: str, ranges: Iterable[tuple[int, int]] | None = None
    ) -> None:
        parent = os.environ.get("TMPDIR") or _DIRECTORY
        try:
            self._directory = tempfile.mkdtemp(prefix="pyqmigrate-", dir=parent)
        except OSError as error:
            raise target_error(error, "cannot create a directory in", parent) from error
        atexit.register(self.close)
        self.path = Path(self._directory, name)
        try:
            _copy(file, self.path, [(0, file.size)] if ranges is None else ranges)
        except BaseException:
            self.close()
            raise

    def push(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Do nothing: all of it is here."""

    def fetch_rest(self) -> None:
        """Do nothing: all of it is here."""

    def requests(self) -> Sequence[tuple[int, int]]:
        """Return nothing: reads of a file are not seen."""
        return ()

    def messages(self) -> Sequence[str]:
        """Return nothing: reads of a file fail by themselves."""
        return ()

    def check_recordable(self) -> str:
        raise NotSupported("no working set can be recorded: the snapshot is read from a copy")

    def write_working_set(self, content: bytes) -> None:
        self.check_recordable()

    def close(self) -> None:
        """Remove the copy. Idempotent."""
        atexit.unregister(self.close)
        shutil.rmtree(self._directory, ignore_errors=True)


def _copy(file: PlainFile, path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, file.size)
            for start, end in ranges:
                _copy_data(file, fd, start, end)
            os.utime(fd, ns=(file.mtime_ns, file.mtime_ns))
        finally:
            os.close(fd)
        for suffix, content in file.companions.items():
            path.with_name(path.name + suffix).write_bytes(content)
    except TargetError:
        raise  # of what is read
    except OSError as error:
        raise target_error(error, "cannot write a copy of the snapshot", path) from error


def _copy_data(file: PlainFile, fd: int, start: int, stop: int) -> None:
    offset = file.next_data(start)
    while offset is not None and offset < stop:
        end = min(file.next_hole(offset), stop)
        while offset < end:
            data = memoryview(file.read(offset, min(_PIECE, end - offset)))
            if not data:
                raise SnapshotTruncated("the snapshot ends early", offset=offset)
            while data:
                written = os.pwrite(fd, data, offset)
                data, offset = data[written:], offset + written
        offset = file.next_data(end)
