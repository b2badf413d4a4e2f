"""A place of objects in a local directory.

Nothing in it is reached through a symbolic link: every folder and file is opened relative to the
folder above, with O_NOFOLLOW.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyqmigrate.errors import NotDurable, TargetError, target_error
from pyqmigrate.io.enclosing_store import refuse_in_store
from pyqmigrate.io.new_file import NewFile
from pyqmigrate.io.place import absolute
from pyqmigrate.store.place import Bytes, Entry, check_key

__all__ = ["LocalPlace"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not block
_MODE = 0o700
_DEPTH_MAX = 32  # folders below each other, listed
_WRITTEN = 1 << 26  # bytes for one write()


class LocalPlace:
    """The directory ``path`` as a :class:`~pyqmigrate.store.place.Place`.

    Symbolic links that lead to the directory itself are followed; those in it are refused.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        """Raises TargetError if it cannot be opened; ``create`` makes the last part of the path, and
        raises UsageError in the directory of another store."""
        self.directory = absolute(path)
        if create:
            refuse_in_store(self.directory, "a store")
        try:
            if create:
                with contextlib.suppress(FileExistsError):
                    self.directory.mkdir(_MODE)
            self._fd = os.open(self.directory, _FOLDER)
        except OSError as error:
            raise target_error(error, "cannot open the store", self.directory) from error

    @property
    def name(self) -> str:
        return os.fspath(self.directory)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> Bytes:
        with self._file(key) as (fd, size):
            rest = max(0, size - offset)
            return self._pread(key, fd, offset, rest if length is None else min(length, rest))

    def read_end(self, key: str, length: int) -> tuple[Bytes, int]:
        with self._file(key) as (fd, size):
            length = min(length, size)
            return self._pread(key, fd, size - length, length), size

    def find(self, key: str) -> Entry | None:
        *folders, last = check_key(key)
        try:
            with self._folder(folders) as fd:
                info = os.stat(last, dir_fd=fd, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise self._error(error, "cannot read", key) from error
        self._check_file(key, info)
        return Entry(key, info.st_size, info.st_mtime)

    def write_new(self, key: str, data: Bytes) -> bool:
        return self._write(key, data, new=True)

    def replace(self, key: str, data: Bytes) -> None:
        self._write(key, data, new=False)

    def delete(self, key: str) -> bool:
        *folders, last = check_key(key)
        try:
            with self._folder(folders) as fd:
                os.unlink(last, dir_fd=fd)
                os.fsync(fd)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise self._error(error, "cannot delete", key) from error
        return True

    def list(self, prefix: str) -> Iterator[Entry]:
        folders = check_key(prefix[:-1]) if prefix.removesuffix("/") else ()
        try:
            with self._folder(folders) as fd:
                yield from self._list(fd, prefix, _DEPTH_MAX)
        except OSError as error:
            if isinstance(error, TargetError):
                raise
            if error.errno != errno.ENOENT:
                raise self._error(error, "cannot list", prefix) from error

    def open_fd(self, key: str) -> int:
        """Return a descriptor of an object, open for reading, which the caller closes: the bytes can
        be read when the object has been deleted. Raises TargetError."""
        *folders, last = check_key(key)
        try:
            with self._folder(folders) as folder:
                fd = os.open(last, _FILE, dir_fd=folder)
        except OSError as error:
            raise self._error(error, "cannot open", key) from error
        try:
            self._check_file(key, os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def open_lock(self, name: str) -> int:
        """Return a descriptor of the file ``name``, created if it is missing, to lock it. The caller
        closes it. Raises TargetError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            return os.open(name, flags, 0o600, dir_fd=self._fd)
        except OSError as error:
            raise self._error(error, "cannot open", name) from error

    def remove_incomplete(self, folder: str, older_than: float) -> None:
        """Remove what killed writers left in a folder on file systems without unnamed files.
        ``older_than`` is a time, in seconds since 1970."""
        with contextlib.suppress(FileNotFoundError), self._folder([folder]) as fd:
            with os.scandir(fd) as found:
                names = [e.name for e in found if e.name[0] == "." and e.name.endswith(".partial")]
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(name, dir_fd=fd, follow_symlinks=False).st_mtime < older_than:
                        os.unlink(name, dir_fd=fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @contextlib.contextmanager
    def _folder(self, names: Sequence[str], *, create: bool = False) -> Iterator[int]:
        """Open the folder below the place; its descriptor is closed afterwards. Raises OSError."""
        fd = self._fd
        if fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            for name in names:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, _MODE, dir_fd=fd)
                        os.fsync(fd)
                below = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
                if fd != self._fd:
                    os.close(fd)
                fd = below
            yield fd
        finally:
            if fd != self._fd:
                os.close(fd)

    @contextlib.contextmanager
    def _file(self, key: str) -> Iterator[tuple[int, int]]:
        """Open an object: its descriptor and size."""
        fd = self.open_fd(key)
        try:
            yield fd, os.fstat(fd).st_size
        finally:
            os.close(fd)

    def _pread(self, key: str, fd: int, offset: int, length: int) -> bytes:
        try:
            data = os.pread(fd, length, offset)
            while len(data) < length:
                more = os.pread(fd, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise self._error(error, "cannot read", key, position=offset) from error
        return data

    def _write(self, key: str, data: Bytes, *, new: bool) -> bool:
        *folders, last = check_key(key)
        named = False
        try:
            with contextlib.ExitStack() as stack:
                folder = stack.enter_context(self._folder(folders, create=True))
                if new and _exists(last, folder):
                    return False
                file = NewFile(folder, last, os.urandom(8).hex())
                stack.callback(file.close)
                rest = memoryview(data).cast("B")
                while rest:
                    rest = rest[os.write(file.fd, rest[:_WRITTEN]) :]
                os.fsync(file.fd)
                if new:
                    if not file.give_new_name():
                        return False
                else:
                    file.give_name()
                named = True
                os.fsync(folder)
        except OSError as error:
            if named:
                raise NotDurable(error.errno or errno.EIO, self._path(key)) from error
            raise self._error(error, "cannot write", key) from error
        return True

    def _list(self, fd: int, prefix: str, depth: int) -> Iterator[Entry]:
        with os.scandir(fd) as found:
            names = sorted(entry.name for entry in found)
        for name in names:
            if name.startswith("."):
                continue  # incomplete files are hidden
            key = prefix + name
            try:
                info = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue  # deleted since
            if not stat.S_ISDIR(info.st_mode):
                self._check_file(key, info)
                yield Entry(key, info.st_size, info.st_mtime)
            elif depth:
                below = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
                try:
                    yield from self._list(below, f"{key}/", depth - 1)
                finally:
                    os.close(below)

    def _check_file(self, key: str, info: os.stat_result) -> None:
        if stat.S_ISLNK(info.st_mode):
            raise TargetError(
                errno.ELOOP, "a symbolic link in a store is not followed", self._path(key)
            )
        if not stat.S_ISREG(info.st_mode):
            number = errno.EISDIR if stat.S_ISDIR(info.st_mode) else errno.EINVAL
            raise TargetError(number, "not a regular file in a store", self._path(key))

    def _path(self, key: str) -> Path:
        return self.directory / key

    def _error(
        self, error: OSError, what: str, key: str, *, position: int | None = None
    ) -> TargetError:
        if isinstance(error, TargetError):
            return error
        if error.errno == errno.ELOOP:
            what = "a symbolic link in a store is not followed"
        elif error.errno == errno.ENOTDIR and _link_above(self.directory, key):
            what, error = "a symbolic link in a store is not followed", OSError(errno.ELOOP, "")
        return target_error(error, what, self._path(key), position=position)


def _exists(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _link_above(directory: Path, key: str) -> bool:
    """Return whether a part of the key is a symbolic link: Linux says ENOTDIR when it refuses one in
    the place of a folder."""
    parts = [part for part in (Path(key), *Path(key).parents) if part.name]
    return any((directory / part).is_symlink() for part in parts)
