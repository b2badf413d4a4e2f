"""Find the data and the holes of a file."""

from __future__ import annotations

import errno
import os

__all__ = ["next_data", "next_hole"]


def next_data(fd: int, offset: int, end: int) -> int:
    """Return the first byte from ``offset`` on that may not be in a hole, at most ``end``.

    That is ``offset`` if the file system does not know its holes. Moves the position of ``fd``.
    """
    try:
        return min(max(os.lseek(fd, offset, os.SEEK_DATA), offset), end)
    except OSError as error:
        # ENXIO: the rest is a hole. Otherwise the file system does not know.
        return end if error.errno == errno.ENXIO else offset


def next_hole(fd: int, offset: int, end: int) -> int:
    """Return the first byte from ``offset`` on that is in a hole, at most ``end``.

    That is ``end`` if the file system does not know its holes. Moves the position of ``fd``.
    """
    try:
        return min(max(os.lseek(fd, offset, os.SEEK_HOLE), offset), end)
    except OSError:
        return end
