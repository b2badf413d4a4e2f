"""The bytes of a file that is shown, not stored: what a store or a compact file has of a snapshot.

A :class:`PlainFile` is a mapped-ram file, byte for byte, whatever form its bytes are kept in. A mount
shows it to programs that read files (:mod:`pyqmigrate.mount`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

from pyqmigrate.errors import TargetError, target_error

__all__ = ["Bytes", "FileOfFrames", "HeldFile", "LocalPlainFile", "PlainFile", "views_of"]

Bytes: TypeAlias = bytes | bytearray | memoryview


class PlainFile(Protocol):
    """A read-only file; all methods may be called by several threads at once.

    ``size`` in bytes; ``mtime_ns`` is the time of change, which a seal names, in nanoseconds since
    1970. ``companions`` are the files beside it: their content by suffix, such as ``.seal``.
    """

    size: int
    mtime_ns: int

    @property
    def companions(self) -> Mapping[str, bytes]: ...

    def read(self, offset: int, length: int) -> Bytes:
        """Return ``length`` bytes at ``offset``; fewer only at the end of the file.

        Raises TargetError, with EIO for bytes that are damaged.
        """
        ...

    def next_data(self, offset: int) -> int | None:
        """Return where the first data at or after ``offset`` are; None if only a hole follows."""
        ...

    def next_hole(self, offset: int) -> int:
        """Return where the first hole at or after ``offset`` begins; the end of the file is one."""
        ...

    def close(self) -> None:
        """Close it. Idempotent."""
        ...


@runtime_checkable
class FileOfFrames(Protocol):
    """A :class:`PlainFile` whose bytes are read and decompressed a frame at a time."""

    def views(self, offset: int, length: int) -> Sequence[Bytes]:
        """Return what :meth:`PlainFile.read` does in parts that are not copied: for writev()."""
        ...

    def cheap_range(self, offset: int, length: int) -> tuple[int, int]:
        """Return the start and end of the bytes around a range that was just read for which nothing
        has to be read or decompressed any more. They are bounds of pages, or the end of the file."""
        ...


@runtime_checkable
class HeldFile(Protocol):
    """A :class:`PlainFile` that is kept from being removed while it is in use."""

    def let_go(self) -> None:
        """Allow that it is removed; it is not read until :meth:`hold`. Idempotent."""
        ...

    def hold(self) -> bool:
        """Keep it from being removed again; return False if that was done, or another has its name."""
        ...


def views_of(file: PlainFile, offset: int, length: int) -> Sequence[Bytes]:
    """Return ``length`` bytes of a file in parts, for writev(), copied only if they must be.

    Raises TargetError, with EIO also if there are fewer.
    """
    if isinstance(file, FileOfFrames):
        found = file.views(offset, length)
    else:
        found = (file.read(offset, length),)
    size = sum(map(len, found))
    if size != length:
        raise TargetError(errno.EIO, f"{size} bytes came instead of {length}")
    return found


class LocalPlainFile:
    """A file of a local disk as a :class:`PlainFile`, with the files beside it that have ``suffixes``."""

    def __init__(
        self, path: str | os.PathLike[str], suffixes: tuple[str, ...] = (".seal",)
    ) -> None:
        """Raises TargetError if it cannot be opened."""
        self._path = os.fspath(path)
        self._suffixes = suffixes
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise target_error(error, "cannot open", self._path) from error
        info = os.fstat(self._fd)
        self.size, self.mtime_ns = info.st_size, info.st_mtime_ns

    @property
    def companions(self) -> Mapping[str, bytes]:
        found = {}
        for suffix in self._suffixes:
            try:
                with open(self._path + suffix, "rb") as file:
                    found[suffix] = file.read()
            except FileNotFoundError:
                continue
        return found

    def read(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._fd, length, offset)
        except OSError as error:
            raise target_error(error, "cannot read", self._path, position=offset) from error

    def next_data(self, offset: int) -> int | None:
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise target_error(error, "cannot seek", self._path, position=offset) from error

    def next_hole(self, offset: int) -> int:
        try:
            return os.lseek(self._fd, offset, os.SEEK_HOLE)
        except OSError as error:
            raise target_error(error, "cannot seek", self._path, position=offset) from error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
