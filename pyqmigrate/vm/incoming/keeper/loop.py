"""Waits for descriptors and for timers."""

from __future__ import annotations

import select
import time
from collections.abc import Callable

__all__ = ["Loop", "Sources"]

Sources = dict[int, tuple[int, Callable[[], None]]]
"""Events of ``select.poll`` to wait for, and what handles them, by descriptor."""


class Loop:
    """Timers, and waits for descriptors until one of either has work."""

    def __init__(self) -> None:
        self._timers: list[tuple[float, Callable[[], None]]] = []

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        """Call ``work`` once, in so many seconds."""
        self._timers.append((time.monotonic() + seconds, work))

    def wait(self, sources: Sources, valid: Callable[[int], bool]) -> None:
        """Wait for a timer or a source, and handle it.

        After each source that was handled, ``valid`` is called with its descriptor: if it returns
        False, the descriptors may be others now, and the call returns.
        """
        now = time.monotonic()
        due = [timer for timer in self._timers if timer[0] <= now]
        if due:
            self._timers = [timer for timer in self._timers if timer[0] > now]
            for _, work in due:
                work()
            return
        poll = select.poll()
        for fd, (events, _) in sources.items():
            poll.register(fd, events)
        timeout = None
        if self._timers:
            timeout = max(min(when for when, _ in self._timers) - now, 0) * 1000 + 0.5
        for fd, _ in poll.poll(timeout):
            sources[fd][1]()
            if not valid(fd):
                return
