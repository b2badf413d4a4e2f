"""When a worker that ended is started again: at once, unless workers die without an answer."""

from __future__ import annotations

import time

__all__ = ["Restarts"]

_PAUSE_MIN, _PAUSE_MAX = 0.01, 2.0  # seconds


class Restarts:
    """``count`` is how many workers ended and were to be started again, ``start_at`` the time
    (``time.monotonic()``) from which on the next one may be started."""

    def __init__(self) -> None:
        self.count = 0
        self.start_at = 0.0
        self._vain = 0  # workers in succession that answered nothing
        self._answered = 0

    def worker_ended(self, answered: int) -> None:
        """Count a worker that ended; ``answered`` requests were answered so far, by all workers."""
        self.count += 1
        # Workers of a damaged installation, for instance, die without an answer.
        self._vain = 0 if answered > self._answered else self._vain + 1
        self._answered = answered
        pause = _PAUSE_MIN * 2 ** min(self._vain, 10) if self._vain else 0.0
        self.start_at = time.monotonic() + min(pause, _PAUSE_MAX)

    def not_started(self) -> None:
        """Put off the next worker, because this one could not be started."""
        self.start_at = time.monotonic() + _PAUSE_MAX
