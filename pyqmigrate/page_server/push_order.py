"""In which order pages go out that nobody has asked for: a working set, then everything else."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

from pyqmigrate.format.working_set import TouchedRun
from pyqmigrate.page_server.blocks import ServedBlock
from pyqmigrate.page_server.reading import Read

__all__ = ["PushOrder"]


class PushOrder:
    """The pages of one connection; ``window`` of them are read together, at most."""

    def __init__(
        self, blocks: Sequence[ServedBlock], working_set: Iterable[TouchedRun], window: int
    ) -> None:
        self._blocks = blocks
        self._first = collections.deque(working_set)
        self._window = window
        self._cursor = (0, 0)

    @property
    def ended(self) -> bool:
        """Whether :meth:`next` has returned None, or will without a look at any page."""
        return not self._first and self._cursor[0] >= len(self._blocks)

    def next(self) -> Read | None:
        """Return the next pages that have to be read; None if there are no more."""
        while self._first:
            read = self._of_working_set(self._first.popleft())
            if read is not None:
                return read
        number, start = self._cursor
        while number < len(self._blocks):
            found = self._blocks[number].next_window(start, self._window)
            if found is not None:
                self._cursor = (number, found[1])
                return Read(number, *found, demand=False)
            number, start = number + 1, 0
            self._cursor = (number, 0)
        return None

    def _of_working_set(self, run: TouchedRun) -> Read | None:
        number, first, npages = run
        block = self._blocks[number]
        found = block.next_window(first - first % block.together, self._window)
        if found is None or found[0] >= first + npages:
            return None
        start, end = found
        if block.together == 1:
            end = min(end, first + npages)
        if end < first + npages:
            self._first.appendleft(TouchedRun(number, end, first + npages - end))
        return Read(number, start, end, demand=False)
