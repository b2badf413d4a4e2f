"""An open file or block device, and what all sources of a stream have in common.

There are two kinds of sources: :class:`InputFile`, which is read at any position, and
:class:`~pyqmigrate.io.pipe.ForwardInput`, which is read front to back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pyqmigrate.errors import TargetError, UsageError, target_error
from pyqmigrate.io.direct_io import Direct, DirectIO, find_direct
from pyqmigrate.io.place import absolute, resolve_symlink
from pyqmigrate.io.target import Descriptors, Target, check_borrowed, split_target

if TYPE_CHECKING:
    from pyqmigrate.io.view import SharedView

__all__ = ["InputFile", "Source", "file_size"]

_PIECE = 1 << 20
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_ZSTD = bytes.fromhex("28b52ffd")  # the magic of a compressed file, which may be a compact one
# O_NONBLOCK: opening a FIFO must not wait for a writer.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


class Source(Protocol):
    """The bytes of a stream.

    ``name`` is for messages. ``place`` is the absolute path of the file, None without one. ``view``
    is what shows a snapshot of a store as a file, None for others: ``place`` is in it then, and
    nothing can be written there.
    ``offset`` is where its target says that the stream starts, bytes.
    ``forward`` says that it can be read front to back only, ``is_device`` that it is a block
    device, which records no time of change. ``fd`` is an open file description that is not shared:
    for a forward-only source, of the part that was kept.
    """

    name: str
    offset: int
    place: Path | None
    view: SharedView | None
    fd: int
    is_device: bool

    @property
    def forward(self) -> bool: ...

    @property
    def size(self) -> int:
        """Length of the stream's file now, bytes; more than that before a forward-only one ends."""
        ...

    @property
    def file_fd(self) -> int:
        """A descriptor of the file, also where the stream is what a decompressor makes of it."""
        ...

    @property
    def file_size(self) -> int:
        """Length of the file, also where the stream is what a decompressor makes of it, bytes."""
        ...

    @property
    def repeatable(self) -> bool:
        """Whether it can be read more than once."""
        ...

    @property
    def run_out(self) -> Callable[[], int] | None:
        """Of a forward-only source: keep all that follows, and return the length of the stream."""
        ...

    def read_at(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes at ``offset``; fewer only at the end."""
        ...

    def read_once(self, offset: int, length: int = ...) -> bytes:
        """Return available bytes at ``offset``, up to ``length``; none at the end of the stream.

        A forward-only source does not keep them.
        """
        ...

    def keep_from(self, offset: int) -> None:
        """End :meth:`read_once`: a forward-only source keeps what it has from ``offset`` on."""
        ...

    def poll_with(self, stop: Callable[[], bool]) -> None:
        """Have a forward-only source give up, with Cancelled, when ``stop`` returns True."""
        ...

    def rewind(self) -> None:
        """Prepare for another pass; UsageError if the stream cannot be read again."""
        ...

    def open_direct(self, setting: DirectIO) -> tuple[Direct | None, str]:
        """Return a direct descriptor for a load, or None and why not; see close_direct."""
        ...

    def close_direct(self, direct: Direct | None) -> None: ...

    def allocated_bytes(self) -> int:
        """Return the bytes of disk that the file holds; of a block device, all of it."""
        ...

    def close(self) -> None:
        """Close it. Idempotent."""
        ...


class InputFile:
    """A file or block device that is open for reading, a :class:`Source`.

    A snapshot of a store (``STORE#NAME``) and a compact file are opened through a view, for which
    ``cache``, ``record`` and ``pages`` are (:class:`~pyqmigrate.io.view.ViewOptions`).
    ``is_duplicate`` says that ``fd`` shares the caller's open file description, with its position
    and its locks. Raises TargetError when it cannot be opened, UsageError for descriptors that do
    not fit, and for a snapshot of a store what :func:`pyqmigrate.io.view.open_view` raises.
    """

    forward = False
    run_out = None

    def __init__(
        self, target: Target, *, cache: Path | None = None, record: bool = False, pages: bool = True
    ) -> None:
        self.name, self.offset = split_target(target)
        self.fd = -1
        self.view: SharedView | None = None
        self._view_options = (cache, record, pages)
        self._given_direct: int | None = None
        self._borrowed = isinstance(target, Descriptors)
        self.place = None if self._borrowed else absolute(self.name)
        self.is_duplicate = False
        if isinstance(target, Descriptors):
            check_borrowed(target, writing=False)
            self._given_direct = target.direct
            try:
                # Looking for holes moves the position, and the caller's must not move.
                self.fd = os.open(f"/proc/self/fd/{target.buffered}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self.fd = fcntl.fcntl(target.buffered, fcntl.F_DUPFD_CLOEXEC, 3)
                self.is_duplicate = True
        else:
            self._open()
        info = os.fstat(self.fd)
        if stat.S_ISREG(info.st_mode) and self.view is None and not self._borrowed:
            info = self._open_shown(info)
        if stat.S_ISDIR(info.st_mode):
            self.close()
            raise TargetError(errno.EISDIR, "cannot open", self.name)
        self.is_device = stat.S_ISBLK(info.st_mode)
        if not (stat.S_ISREG(info.st_mode) or self.is_device):
            self.close()
            raise UsageError(f"{self.name!r} is neither a regular file nor a block device")

    def _open(self) -> None:
        try:
            self.fd = os.open(self.name if self.place is None else self.place, _FLAGS)
        except OSError as error:
            if error.errno not in _ABSENT or "#" not in self.name:
                raise target_error(error, "cannot open", self.name) from error
            # Only a snapshot of a store needs it.
            from pyqmigrate.io.view import ViewOptions, open_view

            self.view = open_view(self.name, ViewOptions(*self._view_options))
            if self.view is None:
                raise target_error(error, "cannot open", self.name) from error
            self._open_in(self.view)

    def _open_shown(self, info: os.stat_result) -> os.stat_result:
        """Open what a compact file shows, if this is one; return what is known of the open file."""
        assert self.place is not None
        try:
            if self.read_at(0, len(_ZSTD)) != _ZSTD:
                return info
            # Only a compressed file needs it.
            from pyqmigrate.io.view import ViewOptions, is_compact, open_compact

            if not is_compact(self.read_at, info.st_size):
                return info
            path = resolve_symlink(self.place)
        except BaseException:
            self.close()
            raise
        self.close()
        self.view = open_compact(path, ViewOptions(*self._view_options))
        self._open_in(self.view)
        return os.fstat(self.fd)

    def _open_in(self, view: SharedView) -> None:
        self.place = view.path
        try:
            self.fd = os.open(view.path, _FLAGS)
        except OSError as error:
            self.close()
            raise target_error(error, "cannot open", self.name) from error

    @property
    def size(self) -> int:
        return file_size(self.fd)

    def read_at(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes at ``offset``; fewer only at the end of the file."""
        parts, have = [], 0
        while have < length:
            try:
                part = os.pread(self.fd, length - have, offset + have)
            except OSError as error:
                failure = target_error(error, "cannot read", self.name, position=offset + have)
                raise (failure if self.view is None else self.view.explain(failure)) from error
            if not part:
                break
            parts.append(part)
            have += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_once(self, offset: int, length: int = _PIECE) -> bytes:
        return self.read_at(offset, length)

    def keep_from(self, offset: int) -> None:
        """Do nothing: everything in a file can be read again."""

    def poll_with(self, stop: Callable[[], bool]) -> None:
        """Do nothing: reading a file does not wait for another process."""

    @property
    def file_fd(self) -> int:
        return self.fd

    @property
    def file_size(self) -> int:
        return self.size

    @property
    def repeatable(self) -> bool:
        return True

    def rewind(self) -> None:
        """Do nothing: a file can be read at any position."""

    def open_direct(self, setting: DirectIO) -> tuple[Direct | None, str]:
        """Return a direct descriptor for a load, or None and why not; see close_direct."""
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
        """Return the bytes of disk that the file holds; of a block device, all of it."""
        return self.size if self.is_device else os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Close it. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.view is not None:
            self.view.close()


def file_size(fd: int) -> int:
    """Return the length of a file or block device, bytes; the position of ``fd`` does not change."""
    info = os.fstat(fd)
    if not stat.S_ISBLK(info.st_mode):
        return info.st_size
    position = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.lseek(fd, position, os.SEEK_SET)
