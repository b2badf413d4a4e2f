"""Resolve file names: the absolute path that a name leads to, and which names fit there.

A name is resolved once, when work begins, so that a change of the current directory or of a link
during the work has no effect.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from pyqmigrate.errors import TargetError, UsageError, target_error
from pyqmigrate.format.suffixes import SEAL

__all__ = [
    "absolute",
    "check_name_fits",
    "partial_name",
    "resolve_symlink",
    "seal_path",
    "sync_directory",
]

_NAME_MAX = 255  # bytes, on nearly all Linux file systems
_LINKS_MAX = 40  # as in the kernel
_OPEN_TO_ALL = stat.S_ISVTX | stat.S_IWOTH


def absolute(name: str | os.PathLike[str]) -> Path:
    """Return the absolute path, without resolving links and ``..`` in it."""
    path = Path(os.fsdecode(name))
    with contextlib.suppress(OSError):  # without a current directory the path fails later
        return Path.cwd() / path
    return path


def resolve_symlink(name: str | os.PathLike[str]) -> Path:
    """Return the absolute path of the file that a name leads to, which need not exist.

    Only links of its last part are read: ``/proc/PID/root`` further up is a link that does not
    lead where its text says. As with the kernel's ``fs.protected_symlinks``, but always, a link in
    a sticky world-writable directory (``/tmp``) is followed only if it belongs to this user or to
    the owner of the directory. Raises TargetError.
    """
    path = absolute(name)
    for _ in range(_LINKS_MAX):
        link = _read_link(path, os.fsdecode(name))
        if link is None:
            return path
        path = path.parent / link
    raise TargetError(errno.ELOOP, "cannot follow its links", os.fsdecode(name))


def _read_link(path: Path, name: str) -> str | None:
    """Return the text of a link that may be followed; None if the path is not a link."""
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None  # opening the file itself raises the error
    try:
        link = os.fstat(fd)
        if not stat.S_ISLNK(link.st_mode):
            return None
        directory = path.parent.stat()
        shared = directory.st_mode & _OPEN_TO_ALL == _OPEN_TO_ALL
        if shared and link.st_uid not in (os.geteuid(), directory.st_uid):
            raise TargetError(
                errno.EACCES,
                f"the link {str(path)!r} belongs to another user (uid {link.st_uid}), in a "
                "world-writable directory, and is not followed; give the path of the file itself",
                name,
            )
        return os.readlink("", dir_fd=fd)
    except TargetError:
        raise
    except OSError as error:
        raise target_error(error, "cannot follow its links", name) from error
    finally:
        os.close(fd)


def check_name_fits(path: Path) -> None:
    """Raise UsageError if the last part of a path is too long for its file system."""
    length, limit = len(os.fsencode(path.name)), _name_max(path.parent)
    if length > limit:
        raise UsageError(
            f"the file name {path.name!r} would have {length} bytes, but {limit} is the limit "
            f"there: choose a name that is at least {length - limit} bytes shorter"
        )


def partial_name(name: str, mark: str, directory: Path | int) -> str:
    """Return a hidden name that fits beside ``name``, for a file that is not complete yet."""
    rest = f".{mark}.partial"
    room = min(200, _name_max(directory) - 1 - len(rest))
    return f".{os.fsdecode(os.fsencode(name)[:room])}{rest}"


def _name_max(directory: Path | int) -> int:
    try:
        limit = os.pathconf(directory, "PC_NAME_MAX")
    except OSError:
        return _NAME_MAX
    return limit if limit > 0 else _NAME_MAX


def seal_path(file: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a file's seal. Symbolic links to the file are followed."""
    path = resolve_symlink(file)
    return path.with_name(path.name + SEAL)


def sync_directory(path: Path) -> None:
    """Make names in the directory of ``path``, and their removal, durable. Raises OSError."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
