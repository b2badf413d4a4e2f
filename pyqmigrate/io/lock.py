"""Lock files between programs: who reads a file, and who changes it in place."""

from __future__ import annotations

import errno
import fcntl

__all__ = ["lock_file"]

_NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


def lock_file(fd: int, *, exclusive: bool) -> None:
    """Take a lock on the open file description of ``fd``, without waiting.

    On a file system without locks nothing is locked: no process can be kept from writing there.
    Raises BlockingIOError where another process has a lock that excludes this one, and OSError.
    """
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
