"""Wait for a store that does not answer: a guest would not survive an error."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from pyqmigrate.errors import TargetError
from pyqmigrate.store.place import is_unreachable

__all__ = ["patiently"]

T = TypeVar("T")

_PAUSE_MIN, _PAUSE_MAX = 0.05, 2.0  # seconds


def patiently(read: Callable[[], T]) -> T:
    """Return the result of ``read``; wait for a store that does not answer."""
    pause = _PAUSE_MIN
    while True:
        try:
            return read()
        except TargetError as error:
            if not is_unreachable(error):
                raise
        time.sleep(pause)
        pause = min(2 * pause, _PAUSE_MAX)
