"""Which pages of a block have to be sent, and which were."""

from __future__ import annotations

import contextlib

from pyqmigrate.format.postcopy.stream import PostcopyBlock
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.page_sending import PagesInFile, SentBlock

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
        self.data_pages = self.pending.count()

    def mark_received(self, bits: bytes) -> None:
        """Take the pages that the destination has, in a connection that replaces a broken one."""
        self.sent.fill(memoryview(bits))
        self.pending.add(self._data)  # what was sent need not have arrived
        self.pending.remove(self.sent)

    def for_sending(self, place: PagesInFile | None) -> SentBlock:
        """Return the block for the core, which borrows the bitmaps; ``place`` is where its pages are in a
        file, if the core may read them."""
        return SentBlock(
            self.name, self.page_size, self.together, self._data, self.pending, self.sent, place
        )

    def next_window(self, start: int, longest: int) -> tuple[int, int] | None:
        """Return the next pages whose first and last are pending, from ``start`` on, or one of the
        destination; None if there are none. They do not go past a multiple of ``longest``."""
        if start >= self.npages:
            return None
        first = start if self.pending[start] else self.pending.run_end(start, self.npages)
        if first >= self.npages:
            return None
        if self.together > 1:
            first -= first % self.together
            return first, first + self.together
        end = min((first // longest + 1) * longest, self.npages)
        while not self.pending[end - 1]:
            end -= 1
        return first, end

    def close(self) -> None:
        """Free the memory. Idempotent."""
        self.sent.close()
        self.pending.close()
