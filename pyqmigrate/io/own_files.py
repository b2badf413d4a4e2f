"""Files that this package writes beside others: seals, indexes, records, pictures.

``SNAPSHOT.seal`` may be a file of the user's, and ``--index`` may name a disk. So each kind of file
can be recognised, and only a regular file that is recognised, or empty, is replaced. That is checked
before work begins::

    place = check_replaceable("/snap/guest.index", INDEX)      # UsageError, and nothing has changed
    ...
    write_whole(place, INDEX, write)                           # appears complete and durable
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pyqmigrate.errors import NotDurable, TargetError, UsageError, target_error
from pyqmigrate.io.new_file import NewFile
from pyqmigrate.io.place import check_name_fits, resolve_symlink

__all__ = [
    "FileKind",
    "check_is_file",
    "check_replaceable",
    "open_directory",
    "remove",
    "write_whole",
]

_LOOKED_AT = 64  # bytes
_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_NOT_OURS = (*_ABSENT, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO)  # a link, a socket
_SPECIAL = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}


@dataclass(frozen=True)
class FileKind:
    """A kind of file: ``noun`` names it in messages (``seal``); ``is_ours`` recognises it by its
    first 1 to 64 bytes; ``may_be_empty`` says that an empty file is replaced."""

    noun: str
    is_ours: Callable[[bytes], bool]
    may_be_empty: bool = True


def check_replaceable(name: str | os.PathLike[str], kind: FileKind) -> Path:
    """Return the absolute path of a file of this kind, links of its last part followed.

    Raises UsageError if something else is there, and if the name is too long; TargetError if that
    cannot be checked.
    """
    place = resolve_symlink(name)
    check_name_fits(place)
    try:
        info = place.lstat()
        check_is_file(place, info, kind.noun)
        ours = kind.may_be_empty if info.st_size == 0 else _is_ours(place, kind)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return place
        raise target_error(
            error, f"cannot check what the {kind.noun} would replace", place
        ) from error
    if not ours:
        raise UsageError(
            f"the {kind.noun} would replace {os.fspath(place)!r}, which has other content: move "
            "that file, or choose another name"
        )
    return place


def check_is_file(path: str | os.PathLike[str], info: os.stat_result, noun: str) -> None:
    """Raise UsageError unless the file that ``noun`` would replace is a regular file."""
    if not stat.S_ISREG(info.st_mode):
        special = _SPECIAL.get(stat.S_IFMT(info.st_mode), "not a regular file")
        raise UsageError(
            f"the {noun} would replace {os.fspath(path)!r}, which is {special}: move it, or "
            "choose another name"
        )


def remove(name: str, kind: FileKind, dir_fd: int | None = None) -> bool:
    """Unlink a file if it is of this kind; return whether it was. Raises OSError.

    A symbolic link is not followed, and an empty file is not removed. Durable once the directory has
    been synced.
    """
    try:
        ours = _is_ours(name, kind, dir_fd)
    except OSError as error:
        if error.errno in _NOT_OURS:
            return False
        raise
    if ours:
        os.unlink(name, dir_fd=dir_fd)
    return ours


def _is_ours(path: str | os.PathLike[str], kind: FileKind, dir_fd: int | None = None) -> bool:
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    fd = os.open(path, flags, dir_fd=dir_fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return False
        head = os.pread(fd, _LOOKED_AT, 0)
        return bool(head) and kind.is_ours(head)
    finally:
        os.close(fd)


def open_directory(place: Path) -> int:
    """Return a descriptor of the directory that a file is in. Raises OSError."""
    return os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def write_whole(
    place: Path, kind: FileKind, write: Callable[[BinaryIO], object], *, sync_name: bool = True
) -> None:
    """Write a file with ``write``, and give it its name when it is complete and durable.
    ``sync_name`` says whether the name is made durable too.

    ``place`` is what :func:`check_replaceable` returned, which is checked again. Raises UsageError
    as that does, NoSpace, TargetError, and NotDurable if the file has its name, but that may not be
    durable.
    """
    place = check_replaceable(place, kind)
    what = f"cannot write the {kind.noun}"
    try:
        with contextlib.ExitStack() as stack:
            dir_fd = open_directory(place)
            stack.callback(os.close, dir_fd)
            file = NewFile(dir_fd, place.name, os.urandom(8).hex())
            stack.callback(file.close)
            with open(file.fd, "wb", closefd=False) as out:
                write(out)
            os.fsync(file.fd)
            file.give_name()
            what = ""
            if sync_name:
                os.fsync(dir_fd)
    except OSError as error:
        if isinstance(error, TargetError):
            raise
        if not what:
            raise NotDurable(error.errno or errno.EIO, place) from error
        raise target_error(error, what, place) from error
