"""Standard descriptors that the caller of the command has closed (``>&-``, ``2>&-``).

The next file to be opened would take the place of a missing one, and get what is printed written
into it. So ``/dev/null`` takes it first, and Python gets a stream there. What
names such a stream by ``-`` asks :func:`was_missing`: data are not thrown away without a word.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["fill_missing_streams", "was_missing"]

_filled: set[int] = set()


def fill_missing_streams() -> None:
    """Open ``/dev/null`` in the place of each of descriptors 0, 1 and 2 that is closed, and of each
    of ``sys.stdin``, ``sys.stdout`` and ``sys.stderr`` that is None. Raises OSError."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free: this one.
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            _filled.add(null)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Not by the number, which a program that calls main() may use for something else.
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115


def was_missing(number: int) -> bool:
    """Whether standard descriptor ``number`` was closed when the command began."""
    return number in _filled
