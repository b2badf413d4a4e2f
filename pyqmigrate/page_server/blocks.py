"""Which pages of a block have to be sent, and which were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pyqmigrate.format.postcopy.stream import PostcopyBlock
from pyqmigrate.io.bitmap import Bitmap

__all__ = ["ServedBlock"]


class ServedBlock:
    """The pages of one block, block ``number`` of the source.

    ``pending`` are those with data that were not sent, ``sent`` all that were, zero pages included.
    ``together`` pages of the guest are one page of the destination, which is sent as a whole. A page is
    marked before it is sent: QEMU fails on a page that comes twice.
    """

    def __init__(self, number: int, block: PostcopyBlock, data: Bitmap) -> None:
        """``data`` is copied. Raises NotSupported for a block that is too large."""
        self.number = number
        self.name = block.spec.name
        self.page_size = block.spec.page_size
        self.together = block.pages_together
        self.npages = block.spec.length // block.spec.page_size
        self._data = data
        with contextlib.ExitStack() as stack:
            self.sent = Bitmap(self.npages)
            stack.callback(self.sent.close)
            self.pending = Bitmap(self.npages)
            self.pending.add(data)
            stack.pop_all()
        self.data_pages = self.left = self.pending.count()

    def mark_received(self, bits: bytes) -> None:
        """Take the pages that the destination has, in a connection that replaces a broken one."""
        self.sent.fill(memoryview(bits))
        self.pending.add(self._data)  # what was sent need not have arrived
        self.pending.remove(self.sent)
        self.left = self.pending.count()

    def take(self, first: int, end: int, *, zeros: bool) -> list[tuple[int, int, bool]]:
        """Return the pages of ``[first, end)`` that have to be sent, marked as sent: ``(from, to, whether
        they have data)`` for each run of them.

        With ``zeros`` also pages without data. Pages that are one of the destination are returned all
        or not at all.
        """
        found: list[tuple[int, int, bool]] = []
        if self.together > 1:
            for start in range(first, end, self.together):
                stop = start + self.together
                if not self.sent[start] and (zeros or self.pending.count_between(start, stop)):
                    found += _runs(self._data, start, stop)
        elif zeros:
            for start, stop, sent in _runs(self.sent, first, end):
                found += [] if sent else _runs(self._data, start, stop)
        else:
            found = [run for run in _runs(self.pending, first, end) if run[2]]
        for start, stop, has_data in found:
            self.left -= (stop - start) if has_data else 0
            self.sent.add_range(start, stop)
            self.pending.remove_range(start, stop)
        return found

    def next_window(self, start: int, longest: int) -> tuple[int, int] | None:
        """Return the next pages, at most ``longest`` or one of the destination, whose first and last are
        pending, from ``start`` on; None if there are none."""
        if start >= self.npages:
            return None
        first = start if self.pending[start] else self.pending.run_end(start, self.npages)
        if first >= self.npages:
            return None
        if self.together > 1:
            first -= first % self.together
            return first, first + self.together
        end = min(first + longest, self.npages)
        while not self.pending[end - 1]:
            end -= 1
        return first, end

    def close(self) -> None:
        """Free the memory. Idempotent."""
        self.sent.close()
        self.pending.close()


def _runs(bitmap: Bitmap, first: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Yield ``(from, to, set)`` of each run of equal bits in ``[first, end)``."""
    while first < end:
        stop = bitmap.run_end(first, end)
        yield first, stop, bitmap[first]
        first = stop
