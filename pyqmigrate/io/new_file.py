"""A file that gets its name when it is complete: no reader opens an incomplete one.

It has no name at first, so that a process that is killed leaves nothing; on a file system without
unnamed files (NFS, FUSE) it has a hidden name.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from pyqmigrate.io.place import partial_name

__all__ = ["NewFile", "give_names"]

_MODE = 0o600
_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


class NewFile:
    """A file of mode 0600 in the directory ``dir_fd``, which is borrowed; ``fd`` is open for reading
    and writing.

    Hidden names are made of ``name`` and ``mark``, which must be unique there. Raises OSError.
    """

    def __init__(self, dir_fd: int, name: str, mark: str) -> None:
        self.name = name
        self._dir_fd = dir_fd
        self._mark = mark
        self._hidden: str | None = None
        self._old: str | None = None
        self._named = False
        self.fd = -1
        if Path("/proc/self/fd").exists():
            try:
                self.fd = os.open(
                    ".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, _MODE, dir_fd=dir_fd
                )
                return
            except OSError as error:
                if error.errno not in _NO_UNNAMED_FILES:
                    raise
        hidden = self._hide("")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self.fd = os.open(hidden, flags, _MODE, dir_fd=dir_fd)
        self._hidden = hidden

    def _hide(self, what: str) -> str:
        return partial_name(self.name, f"{what}{self._mark}", self._dir_fd)

    def give_name(self) -> None:
        """Give it its name, and replace a file that has the name. If this raises OSError, nothing
        has changed."""
        if self._hidden is None:
            source = f"/proc/self/fd/{self.fd}"
            try:
                os.link(source, self.name, dst_dir_fd=self._dir_fd, follow_symlinks=True)
                self._named = True
                return
            except FileExistsError:  # Linux cannot link over a name
                hidden = self._hide("")
                os.link(source, hidden, dst_dir_fd=self._dir_fd, follow_symlinks=True)
                self._hidden = hidden
        os.replace(self._hidden, self.name, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)
        self._hidden = None
        self._named = True

    def give_new_name(self) -> bool:
        """Give it its name; return False if a file has the name, which is not changed. Raises
        OSError."""
        try:
            if self._hidden is None:
                source = f"/proc/self/fd/{self.fd}"
                os.link(source, self.name, dst_dir_fd=self._dir_fd, follow_symlinks=True)
            else:
                self._link_hidden(self._hidden)
        except FileExistsError:
            return False
        self._named = True
        return True

    def _link_hidden(self, hidden: str) -> None:
        dir_fd = self._dir_fd
        try:
            os.link(hidden, self.name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # Another process may take the name between the two calls, where nothing is better.
            with contextlib.suppress(FileNotFoundError):
                os.stat(self.name, dir_fd=dir_fd, follow_symlinks=False)
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            os.rename(hidden, self.name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            self._hidden = None

    def keep_old(self) -> None:
        """Keep the file that has the name now, under a hidden name, so that :meth:`take_back` can
        restore it. Raises OSError."""
        old = self._hide("old-")
        with contextlib.suppress(FileNotFoundError):
            try:
                os.link(
                    self.name,
                    old,
                    src_dir_fd=self._dir_fd,
                    dst_dir_fd=self._dir_fd,
                    follow_symlinks=False,
                )
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                os.rename(self.name, old, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)
            self._old = old

    def take_back(self) -> None:
        """Roll back :meth:`give_name`: restore the old file. Raises OSError."""
        if self._old is not None:
            os.replace(self._old, self.name, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)
            self.drop_old()  # it remains if both names were links to the old file
        elif self._named:
            os.unlink(self.name, dir_fd=self._dir_fd)
        self._named = False

    def drop_old(self) -> None:
        """Remove the file that :meth:`keep_old` kept."""
        if self._old is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._old, dir_fd=self._dir_fd)
            self._old = None

    def close(self) -> None:
        """Close it; without a name it is gone then. Idempotent."""
        if self._hidden is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._hidden, dir_fd=self._dir_fd)
            self._hidden = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def give_names(files: list[NewFile]) -> None:
    """Give all files their names, or none: if that fails for one, replaced files are restored.
    Raises OSError, whose note says what could not be restored."""
    touched: list[NewFile] = []
    try:
        for file in files:
            touched.append(file)
            file.keep_old()
            file.give_name()
    except BaseException as error:
        for file in reversed(touched):
            try:
                file.take_back()
            except OSError as failed:
                error.add_note(f"({file.name!r} could not be restored: {failed.strerror}) ")
        raise
    for file in files:
        file.drop_old()
