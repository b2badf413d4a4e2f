"""``-``: standard input where a snapshot is read, standard output where one is written."""

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
    """Whether the argument means a standard stream; a file of that name is ``./-``."""
    return path == STANDARD


def read_from(path: str, offset: int | None) -> tuple[str, int | None]:
    """The path and the offset that an argument means; a file is read from its present position.

    Raises UsageError where standard input is closed.
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
    """The target that an argument means. ``forward`` says why what is written needs a file with
    positions; None: a pipe will do.

    Raises UsageError for a standard output that will not do.
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
        raise UsageError(f"'-' is not a file here, and {forward}: name a file, or redirect to one")
    if os.isatty(1):
        raise UsageError("standard output is a terminal: redirect it to a file or a pipe")
    return Descriptors(1)


def refuse_standard(path: str, why: str) -> None:
    """UsageError where the argument is ``-``."""
    if is_standard(path):
        raise UsageError(f"'-' is not possible here: {why} (a file of that name is ./-)")
