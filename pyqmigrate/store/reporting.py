"""Progress of work on a store, for one callback, from any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyqmigrate.io.job import Progress

__all__ = ["Reporter"]

_EVERY = 0.1  # seconds


class Reporter:
    """Calls ``progress`` now and then, of ``total`` bytes; :meth:`add` is called by any thread."""

    def __init__(self, progress: Callable[[Progress], object] | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._moved = 0
        self._began = time.monotonic()
        self._last = 0.0
        self._lock = threading.Lock()

    def add(self, done: int, moved: int | None = None) -> None:
        """Count bytes that are done, and those that were moved for it."""
        with self._lock:
            self._done += done
            self._moved += done if moved is None else moved
            now = time.monotonic()
            if self._progress is None or now - self._last < _EVERY:
                return
            self._last = now
            seconds = now - self._began
            state = Progress(
                self._done, self._total, 0, 0, self._moved, seconds, self._done / max(seconds, 1e-9)
            )
            self._progress(state)
