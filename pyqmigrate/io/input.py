"""A file or block device that is opened for reading."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from pyqmigrate.errors import TargetError, UsageError, target_error
from pyqmigrate.io.direct_io import Direct, DirectIO, find_direct
from pyqmigrate.io.place import absolute
from pyqmigrate.io.target import Descriptors, Target, check_borrowed, split_target

__all__ = ["InputFile", "file_size"]


class InputFile:
    """A file or block device being read: ``fd`` is an open file description of our own.

    ``is_device`` says that it is a block device, which records no time of change. ``passing`` says
    that it is neither, and can be read front to back only (:mod:`pyqmigrate.io.pipe`).
    ``place`` is the absolute path under which the file was opened, None with descriptors. Raises
    TargetError when it cannot be opened, UsageError for descriptors that do not fit.
    """

    passing = False
    is_device = False
    place: Path | None

    def __init__(self, target: Target) -> None:
        self.name, self.offset = split_target(target)
        self.fd = -1
        self._given_direct: int | None = None
        self._borrowed = isinstance(target, Descriptors)
        self.place = None if self._borrowed else absolute(self.name)
        self.is_duplicate = False  # of the caller's description, with its position and its locks
        if isinstance(target, Descriptors):
            check_borrowed(target, writing=False)
            self._given_direct = target.direct
            try:
                # Looking for holes moves the position, and the caller's is not ours to move.
                self.fd = os.open(f"/proc/self/fd/{target.buffered}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self.fd = fcntl.fcntl(target.buffered, fcntl.F_DUPFD_CLOEXEC, 3)
                self.is_duplicate = True
        else:
            try:
                # O_NONBLOCK: to open a FIFO must not wait for a writer.
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
                self.fd = os.open(self.name if self.place is None else self.place, flags)
            except OSError as error:
                raise target_error(error, "cannot open", self.name) from error
        info = os.fstat(self.fd)
        if stat.S_ISDIR(info.st_mode):
            self.close()
            raise TargetError(errno.EISDIR, "cannot open", self.name)
        self.is_device = stat.S_ISBLK(info.st_mode)
        if not (stat.S_ISREG(info.st_mode) or self.is_device):
            self.close()
            raise UsageError(f"{self.name!r} is neither a regular file nor a block device")

    @property
    def size(self) -> int:
        """Length of the file or block device now, bytes."""
        return file_size(self.fd)

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes at ``offset``; fewer only at the end of the file."""
        parts, have = [], 0
        while have < length:
            try:
                part = os.pread(self.fd, length - have, offset + have)
            except OSError as error:
                raise target_error(
                    error, "cannot read", self.name, position=offset + have
                ) from error
            if not part:
                break
            parts.append(part)
            have += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def file_fd(self) -> int:
        """A descriptor of the file, whether or not the stream is what it holds."""
        return self.fd

    @property
    def file_size(self) -> int:
        """Length of the file, whether or not the stream is what it holds, bytes."""
        return self.size

    @property
    def repeatable(self) -> bool:
        """Whether it can be read more than once."""
        return True

    def rewind(self) -> None:
        """Make ready for another pass; UsageError where that cannot be."""

    def open_direct(self, setting: DirectIO) -> tuple[Direct | None, str]:
        """A direct descriptor for a load, or None and why not. Give it to close_direct."""
        if self._borrowed and self._given_direct is None:
            if setting is DirectIO.ON:
                raise UsageError(
                    'direct_io="on" with Descriptors needs a second descriptor, '
                    "opened with O_DIRECT"
                )
            return None, "no direct descriptor was given"
        return find_direct(self.fd, self._given_direct, setting, self.name, write_at=None)

    def close_direct(self, direct: Direct | None) -> None:
        """Close what open_direct opened; a borrowed descriptor stays open."""
        if direct is not None and self._given_direct is None:
            os.close(direct.fd)

    def allocated_bytes(self) -> int:
        """Bytes of disk that the file holds; of a block device, all of it."""
        return self.size if self.is_device else os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """May be repeated."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def file_size(fd: int) -> int:
    """Length of a file or block device, bytes. The position of ``fd`` is afterwards as before."""
    info = os.fstat(fd)
    if not stat.S_ISBLK(info.st_mode):
        return info.st_size
    position = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.lseek(fd, position, os.SEEK_SET)
