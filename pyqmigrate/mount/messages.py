"""Messages of a mount that serves in the background: kept for its status, and copied elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Message", "Messages"]

_KEPT = 100
_TEXT_MAX = 2000
_REPEATED = 10.0  # seconds in which the same text is kept once


class Message(NamedTuple):
    """``when`` in seconds since 1970."""

    when: float
    text: str


class Messages:
    """The last 100 messages. ``write`` gets each of them, such as for a log file."""

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        self._kept: deque[Message] = deque(maxlen=_KEPT)
        self._write = write

    def add(self, text: str) -> bool:
        """Add a message; the same text again within 10 seconds is not a new one: then return False."""
        text = text[:_TEXT_MAX]
        now = time.time()
        if any(old.text == text and now - old.when < _REPEATED for old in self._kept):
            return False
        self._kept.append(Message(now, text))
        if self._write is not None:
            with contextlib.suppress(OSError):  # a full disk does not end the mount
                self._write(text)
        return True

    def all(self) -> list[Message]:
        """Return the messages, the oldest first."""
        return list(self._kept)
