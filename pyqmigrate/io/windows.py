"""Windows: parts of a RAM block of a snapshot in memory, to look at their bytes.

    reader = WindowReader(block.memory(), block.page_size, layers, job)
    data = reader.read(channel, Window(8 << 20), first_page, npages)

Pages without data are filled with zeros and not read. A block whose pages have fixed places in files is
read by the core as in a load, with direct I/O if there is a descriptor for that; any other is read
through its :class:`~pyqmigrate.io.memory.SnapshotMemory`.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyqmigrate.core import Block, Channel, File, JobState, Policy, Transfer
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.direct_io import Direct
from pyqmigrate.io.mapping import unmap
from pyqmigrate.io.memory import OpenMemory, SnapshotMemory

__all__ = ["FIRST_MULTIPLE", "PagesInFile", "Window", "WindowReader"]

FIRST_MULTIPLE = 64  # a window starts at a multiple of so many pages

_READ_GAP = 32 << 10  # bytes: longer gaps between pages with data are not read over


@dataclass(frozen=True)
class PagesInFile:
    """A file, and the pages of a block that come from it: those whose bits are set."""

    fd: int
    direct: Direct | None
    layout: BlockLayout
    bitmap: Bitmap


class Window:
    """``size`` bytes of memory, aligned for direct I/O. Close it, after the last view of it."""

    def __init__(self, size: int) -> None:
        self._mapping = mmap.mmap(-1, size)
        self._mapping.madvise(mmap.MADV_DONTFORK)  # a child would split it from what is read
        with contextlib.suppress(OSError):  # not every kernel has huge pages
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.size = size
        self.memory = OpenMemory("", self._mapping, writable=True)
        self.data = memoryview(self._mapping)

    def close(self) -> None:
        """Free the memory. Idempotent."""
        self.memory.close()
        self.data.release()
        unmap(self._mapping)


class WindowReader:
    """Reads windows of one block, whose ``memory`` this is; several threads may.

    ``layers`` are its pages in files, none for a block without fixed places; pages that are in none
    of them are zeros. Files, bitmaps and ``memory`` must stay open; ``job`` counts
    what was read, and can be cancelled.
    """

    def __init__(
        self, memory: SnapshotMemory, page_size: int, layers: Sequence[PagesInFile], job: JobState
    ) -> None:
        self._source, self._page_size = memory.source, page_size
        self._layers, self._job = layers, job

    def next_data(self, offset: int, end: int) -> int:
        """Return the next byte of the block, from ``offset`` on and at most ``end``, that may not be
        zero. OSError."""
        found = int(self._source.next(self._source.argument, offset, end))
        if found < 0:
            raise OSError(-found, "cannot find the data")
        return min(found, end)

    def read(self, channel: Channel, window: Window, first: int, npages: int) -> memoryview:
        """Read pages ``[first, first + npages)`` and return them; valid until the window's next use.

        ``first`` is a multiple of 64. OSError with the core's errno: ENODATA if the file has become
        shorter, ECANCELED.
        """
        length = npages * self._page_size
        if first % FIRST_MULTIPLE or length > window.size or first < 0:
            raise ValueError(f"{npages} pages from {first} do not fit into a window")
        if self._job.cancelled:
            raise OSError(errno.ECANCELED, "cancelled")
        if self._layers:
            for number, layer in enumerate(self._layers):
                self._read_layer(channel, window, layer, first, npages, clear=number == 0)
        else:
            pointer = window.memory.core.base
            start = first * self._page_size
            got = int(self._source.fill(self._source.argument, pointer, start, length))
            if got < length:
                raise OSError(-got if got < 0 else errno.ENODATA, "cannot read pages")
            self._job.count_io(length)
            self._job.count_pages(length, npages)
        return window.data[:length]

    def _read_layer(
        self,
        channel: Channel,
        window: Window,
        layer: PagesInFile,
        first: int,
        npages: int,
        *,
        clear: bool,
    ) -> None:
        size = self._page_size
        transfer = Transfer(
            self._job,
            Block(npages * size, size, layer.layout.pages_offset + first * size),
            file=File(layer.fd, layer.direct),
            memory=window.memory,
            policy=Policy(max_gap=_READ_GAP, zero_clear=clear),
            data=_BitsFrom(layer.bitmap, first),
        )
        rc = transfer.read(channel, 0, npages)
        if rc < 0:
            raise OSError(-rc, "cannot read pages")


class _BitsFrom:
    """A bitmap from bit ``first`` on, a multiple of 64."""

    def __init__(self, bitmap: Bitmap, first: int) -> None:
        self._bitmap, self._word = bitmap, first // 64

    @property
    def core(self) -> Any:
        return self._bitmap.core + self._word
