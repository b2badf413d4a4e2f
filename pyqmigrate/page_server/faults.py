"""What the guest has asked for, in order, and how long it waited."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyqmigrate.format.working_set import RUNS_MAX, TouchedRun, WorkingSet

__all__ = ["Faults"]


class Faults:
    """Counts ``requests``, and pages ``sent`` of any kind; with ``record`` it keeps what was asked for."""

    def __init__(self, record: bool) -> None:
        self._touched = WorkingSet() if record else None
        self._last: TouchedRun | None = None
        self.sent = 0
        self.requests = 0
        self._answers = 0
        self._seconds = 0.0
        self._longest = 0.0

    def touch(self, block: int, first: int, npages: int) -> None:
        """Take pages of a block that are asked for, each for the first time."""
        if self._touched is None:
            return
        last = self._last
        if last is not None and last.block == block and last.first + last.npages == first:
            self._last = TouchedRun(block, last.first, last.npages + npages)
            return
        self._keep()
        self._last = TouchedRun(block, first, npages)

    def _keep(self) -> None:
        if self._last is not None and self._touched is not None and len(self._touched) < RUNS_MAX:
            self._touched.append(self._last)
        self._last = None

    def answered(self, seconds: float) -> None:
        """Count an answer, ``seconds`` after its request."""
        self._answers += 1
        self._seconds += seconds
        self._longest = max(self._longest, seconds)

    def touched(self) -> Iterator[TouchedRun]:
        """Yield the pages that were asked for, in the order of their first request, each once."""
        self._keep()
        yield from self._touched or ()

    def to_json(self) -> dict[str, Any]:
        """Return the counts; latencies in seconds."""
        return {
            "pages_sent": self.sent,
            "requests": self.requests,
            "mean_latency": self._seconds / self._answers if self._answers else 0.0,
            "longest_latency": self._longest,
        }
