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

    def has_data(self, page: int) -> bool:
        """Return whether the page has data, sent or not."""
        return self._data[page]

    def mark_received(self, bits: bytes) -> None:
        """Take the pages that the destination has, in a connection that replaces a broken one."""
        self.sent.fill(memoryview(bits))
        self.pending.add(self._data)  # what was sent need not have arrived
        self.pending.remove(self.sent)
        self.left = self.pending.count()

    def take(self, first: int, end: int, *, zeros: bool) -> list[int]:
        """Return the pages of ``[first, end)`` that have to be sent, marked as sent.

        With ``zeros`` also pages without data. Pages that are one of the destination are returned all
        or not at all.
        """
        if self.together > 1:
            pages = [
                page
                for start in range(first, end, self.together)
                if not self.sent[start]
                and (zeros or self.pending.count_between(start, start + self.together))
                for page in range(start, start + self.together)
            ]
        elif zeros:
            pages = [page for page in range(first, end) if not self.sent[page]]
        else:
            pages = [page for page in range(first, end) if self.pending[page]]
        for start, stop in _runs(pages):
            self.left -= self.pending.count_between(start, stop)
            self.sent.add_range(start, stop)
            self.pending.remove_range(start, stop)
        return pages

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


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Yield ``[first, end)`` of each run of consecutive pages."""
    start = 0
    for k in range(1, len(pages) + 1):
        if k == len(pages) or pages[k] != pages[k - 1] + 1:
            yield pages[start], pages[k - 1] + 1
            start = k
