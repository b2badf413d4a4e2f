"""The argument ``-``: standard input for reading a snapshot, standard output for writing one."""

from __future__ import annotations

import contextlib
import os
import stat
import sys

from pyqmigrate.cli.missing_streams import was_missing
from pyqmigrate.errors import UsageError
from pyqmigrate.io.target import Descriptors, Target

__all__ = ["STANDARD", "is_standard", "read_from", "refuse_standard", "write_to"]

STANDARD = "-"
_INPUT = "/dev/stdin"


def is_standard(path: str) -> bool:
    """Return whether the argument means a standard stream; a file of that name is ``./-``."""
    return path == STANDARD


def read_from(path: str, offset: int | None) -> tuple[str, int | None]:
    """Return the path and the offset to read; standard input is read from its current position.

    Raises UsageError if standard input is closed.
    """
    if not is_standard(path):
        return path, offset
    if was_missing(0):
        raise UsageError("'-' is standard input, which is closed: redirect it, or name a file")
    if offset is None:
        with contextlib.suppress(OSError):
            offset = os.lseek(0, 0, os.SEEK_CUR) or None
    return _INPUT, offset


def write_to(path: str, *, forward: str | None) -> Target:
    """Return the target that an argument means.

    forward: the reason why the output cannot go through a pipe; None if it can.

    Raises UsageError for an unsuitable standard output.
    """
    if not is_standard(path):
        return path
    if was_missing(1):
        raise UsageError("'-' is standard output, which is closed: redirect it, or name a file")
    if stat.S_ISREG(os.fstat(1).st_mode):
        if sys.stdout is not None:
            sys.stdout.flush()
        return Descriptors(1, offset=os.lseek(1, 0, os.SEEK_CUR))
    if forward is not None:
        raise UsageError(
            f"standard output ('-') is not a file, and {forward}: name a file, or redirect to one"
        )
    if os.isatty(1):
        raise UsageError("standard output is a terminal: redirect it to a file or a pipe")
    return Descriptors(1)


def refuse_standard(path: str, why: str) -> None:
    """Raise UsageError if the argument is ``-``."""
    if is_standard(path):
        raise UsageError(f"'-' is not possible here: {why} (a file of that name is ./-)")
