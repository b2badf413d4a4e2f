"""Where a file holds data."""

from __future__ import annotations

import errno
import os

__all__ = ["next_data", "next_hole"]


def next_data(fd: int, at: int, end: int) -> int:
    """The first byte at or after ``at`` that may not be in a hole, at most ``end``.

    ``at`` itself where the file system does not tell. Moves the position of ``fd``.
    """
    try:
        return min(max(os.lseek(fd, at, os.SEEK_DATA), at), end)
    except OSError as error:
        # ENXIO: only a hole is left. Anything else: no such notion.
        return end if error.errno == errno.ENXIO else at


def next_hole(fd: int, at: int, end: int) -> int:
    """The first byte at or after ``at`` that is in a hole, at most ``end``.

    ``end`` where the file system does not tell. Moves the position of ``fd``.
    """
    try:
        return min(max(os.lseek(fd, at, os.SEEK_HOLE), at), end)
    except OSError:
        return end
