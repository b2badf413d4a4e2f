"""What the guest has asked for, in order."""

from __future__ import annotations

from collections.abc import Iterator

from pyqmigrate.format.working_set import RUNS_MAX, TouchedRun, WorkingSet

__all__ = ["TouchedPages"]


class TouchedPages:
    """Pages in the order of their first request, each once."""

    def __init__(self) -> None:
        self._runs = WorkingSet()
        self._last: TouchedRun | None = None

    def add(self, block: int, first: int, npages: int) -> None:
        """Add pages of a block that are asked for, each for the first time."""
        last = self._last
        if last is not None and last.block == block and last.first + last.npages == first:
            self._last = TouchedRun(block, last.first, last.npages + npages)
            return
        self._keep()
        self._last = TouchedRun(block, first, npages)

    def _keep(self) -> None:
        if self._last is not None and len(self._runs) < RUNS_MAX:
            self._runs.append(self._last)
        self._last = None

    def runs(self) -> Iterator[TouchedRun]:
        """Yield them."""
        self._keep()
        yield from self._runs
