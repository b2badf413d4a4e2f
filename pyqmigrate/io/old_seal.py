"""The seal that lies beside a file already: whether it is one of ours, and taking it away.

``SNAPSHOT.seal`` may be anybody's file: what does not begin as a seal of ours does is neither
removed nor replaced.
"""

from __future__ import annotations

import errno
import os
import stat

from pyqmigrate.errors import UsageError
from pyqmigrate.format.seal import is_seal

__all__ = ["check_replaceable", "remove"]

_LOOKED_AT = 64  # bytes
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """UsageError where ``path`` has something that is no seal of ours; links are followed.

    Raises OSError.
    """
    try:
        ours = _is_ours(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NO_FILE:
            return
        if error.errno != errno.ENXIO:  # a socket
            raise
        ours = False
    if not ours:
        raise UsageError(
            f"{os.fspath(path)!r} is no seal of pyqmigrate's and is left alone: move it away, or "
            "give the snapshot another name"
        )


def remove(name: str, dir_fd: int | None = None) -> bool:
    """Unlink what ``name`` has if that is a seal of ours; whether it was. Raises OSError.

    A symbolic link is never one. Durable once the directory has been synced.
    """
    try:
        ours = _is_ours(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd)
    except OSError as error:
        if error.errno in (*_NO_FILE, errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            return False
        raise
    if ours:
        os.unlink(name, dir_fd=dir_fd)
    return ours


def _is_ours(
    path: str | os.PathLike[str], flags: int, dir_fd: int | None = None
) -> bool:
    # O_NONBLOCK: to open a FIFO must not wait for a writer.
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dir_fd)
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and is_seal(os.pread(fd, _LOOKED_AT, 0))
    finally:
        os.close(fd)
