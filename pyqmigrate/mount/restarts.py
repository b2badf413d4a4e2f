"""When a worker that ended is started again: at once, unless workers die without an answer."""

from __future__ import annotations

import time

__all__ = ["Restarts"]

_PAUSE_MIN, _PAUSE_MAX = 0.01, 2.0  # seconds
_LOOK = 0.5  # seconds between two looks at a worker that may be stuck


class Restarts:
    """``count`` is how many workers ended and were to be started again, ``start_at`` the time
    (``time.monotonic()``) from which on the next one may be started."""

    def __init__(self) -> None:
        self.count = 0
        self.start_at = 0.0
        self._vain = 0  # workers in succession that answered nothing
        self._answered = 0
        self._stuck_since: float | None = None

    def is_stuck(self, half_ended: bool) -> bool:
        """Return whether a worker does not end that is ``half_ended``, as it is for a moment whenever it ends."""
        now = time.monotonic()
        if not half_ended:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = now
        return self._stuck_since is not None and now - self._stuck_since >= _LOOK

    def worker_ended(self, answered: int) -> None:
        """Count a worker that ended; ``answered`` requests were answered so far, by all workers."""
        self.count += 1
        self._stuck_since = None
        # Workers of a damaged installation, for instance, die without an answer.
        self._vain = 0 if answered > self._answered else self._vain + 1
        self._answered = answered
        pause = _PAUSE_MIN * 2 ** min(self._vain, 10) if self._vain else 0.0
        self.start_at = time.monotonic() + min(pause, _PAUSE_MAX)

    def not_started(self) -> None:
        """Put off the next worker, because this one could not be started."""
        self.start_at = time.monotonic() + _PAUSE_MAX
