"""Standard descriptors that the caller of the command has closed (``>&-``, ``2>&-``).

The next file to be opened would get the number of a closed one, and everything that is printed. So
``/dev/null`` is opened there first. A verb whose argument ``-`` means such a stream checks
:func:`was_missing`, so that no data is lost silently.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["fill_missing_streams", "was_missing"]

_filled: set[int] = set()


def fill_missing_streams() -> None:
    """Open ``/dev/null`` for each closed descriptor of 0, 1 and 2, and for each of ``sys.stdin``,
    ``sys.stdout`` and ``sys.stderr`` that is None. Raises OSError."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # open() returns the lowest free number: this one.
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            _filled.add(null)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # By path: a program that calls main() may use the number for something else.
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115


def was_missing(number: int) -> bool:
    """Return whether standard descriptor ``number`` was closed when the command started."""
    return number in _filled
