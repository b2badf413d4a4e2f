"""New pages, gathered in the order of the file, compressed by other threads, and written in that order."""

from __future__ import annotations

from array import array
from collections import deque
from concurrent.futures import Executor, Future

from pyqmigrate.format.store.config import PAGE
from pyqmigrate.io.store_pages import ExaminedPages, FoundPages, KnownPages
from pyqmigrate.store.pack_writer import FrameMaker, MadeFrame, PackWriter

__all__ = ["NewPages"]

_GROUP = 1024  # pages that are compressed by one task
_AHEAD = 4  # groups that are compressed at a time


class _Group:
    """New pages that are compressed together, and the file page of each."""

    def __init__(self, room: int) -> None:
        self.pages = memoryview(bytearray(room * PAGE))
        self.places = memoryview(array("Q", bytes(8 * room)))
        self.filled = 0

    def room(self) -> tuple[memoryview, memoryview]:
        """Return where the next new pages go."""
        return self.pages[self.filled * PAGE :], self.places[self.filled :]

    def take_rest(self, other: _Group, first: int) -> None:
        """Become the pages of another group from ``first`` on."""
        self.filled = other.filled - first
        self.pages[: self.filled * PAGE] = other.pages[first * PAGE : other.filled * PAGE]
        self.places[: self.filled] = other.places[first : other.filled]


class NewPages:
    """Pages that are not among ``known`` go into frames of ``frame_pages`` and to ``writer``.

    ``most`` is how many pages are looked up at once, at most. For one thread; ``threads`` compress.
    """

    def __init__(
        self,
        known: KnownPages,
        frames: FrameMaker,
        writer: PackWriter,
        threads: Executor,
        *,
        frame_pages: int,
        most: int,
    ) -> None:
        self._known, self._frames, self._writer = known, frames, writer
        self._threads = threads
        self._frame_pages = frame_pages
        self._room = _GROUP + most
        self._first = self._given = len(known)
        self._group = _Group(self._room)
        self._free: list[_Group] = []
        self._making: deque[tuple[_Group, int, Future[list[MadeFrame]]]] = deque()

    def __len__(self) -> int:
        """How many pages were new."""
        return len(self._known) - self._first

    def find(self, data: memoryview, page: int, examined: ExaminedPages) -> FoundPages:
        """Look up pages, from file page ``page`` on, and take those that are new.

        Raises what writing an earlier pack raised.
        """
        found = self._known.find(data, page, examined, *self._group.room())
        self._group.filled += found.fresh
        if self._group.filled >= _GROUP:
            self._give(self._group.filled // self._frame_pages * self._frame_pages)
            self._collect(_AHEAD)
        return found

    def finish(self) -> None:
        """Make and write what is left, and wait until all packs are durable. Raises TargetError."""
        self._give(self._group.filled)
        self._collect(0)
        self._writer.finish()

    def _give(self, count: int) -> None:
        """Have the first ``count`` pages of the group compressed."""
        group = self._group
        if not count:
            return
        self._group = self._free.pop() if self._free else _Group(self._room)
        self._group.take_rest(group, count)
        pages, places = group.pages[: count * PAGE], group.places[:count].tolist()
        making = self._threads.submit(self._frames.make, pages, places)
        self._making.append((group, self._given, making))
        self._given += count

    def _collect(self, most: int) -> None:
        """Write frames that are made until at most ``most`` groups are left."""
        while len(self._making) > most:
            group, first, making = self._making.popleft()
            for frame in making.result():
                self._writer.add(frame, self._known.digests(first, frame.npages))
                first += frame.npages
            self._free.append(group)
