"""A mapped-ram file as a store takes it: pages of RAM, extents of other bytes, and digests for a seal.

Pages whose bit is clear are zeros in what is stored, whatever the file has in their place. The pages of
an increment are read from the increment and its base: its mapped-ram file is an outline.
"""

from __future__ import annotations

import errno
import os
import queue
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from pyqmigrate.core import Block, MemorySource
from pyqmigrate.errors import SnapshotTruncated, target_error
from pyqmigrate.format.digest import Data
from pyqmigrate.format.seal import PIECE
from pyqmigrate.format.store.config import PAGE
from pyqmigrate.format.store.snapshot import Extent
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.holes import next_data, next_hole
from pyqmigrate.io.store_pages import ExaminedPages, examine_pages
from pyqmigrate.snapshot.base import Snapshot, error_from_errno
from pyqmigrate.snapshot.mapped_ram import MappedRamBlock, MappedRamSnapshot

__all__ = ["CHUNK", "Chunk", "PagePart", "ShownFile", "Span"]

CHUNK = 4 << 20  # bytes that one thread reads at a time; whole pieces of a seal
_JOINED = 64 << 10  # bytes of a hole that are read like data: a call costs more
_ZEROS = bytes(CHUNK)


@dataclass(frozen=True)
class _Area:
    """The whole store pages of a block: bytes ``[start, end)`` of the file. ``source`` has them if the
    file does not."""

    start: int
    end: int
    block: Block
    bitmap: Bitmap
    name: str
    page_size: int
    source: MemorySource | None


@dataclass(frozen=True)
class PagePart:
    """Examined pages from file page ``first`` on. ``data`` is borrowed from its chunk."""

    first: int
    data: memoryview
    examined: ExaminedPages


@dataclass
class Chunk:
    """What bytes ``[start, end)`` of the file have. ``digests`` are those of their pieces."""

    start: int
    end: int
    buffer: bytearray | None = None
    pages: list[PagePart] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    digests: bytes = b""


@dataclass(frozen=True)
class Span:
    """Bytes ``[start, end)`` of the file, whole pieces: those of the parent, a hole, or to be read."""

    start: int
    end: int
    same: bool = False
    hole: bool = False


class ShownFile:
    """The mapped-ram file of an open snapshot, which is borrowed. :meth:`read` may be called by several
    threads. ``pages`` are the blocks of a file that has only their places, by name, and ``original`` the
    snapshot that they are read from."""

    def __init__(
        self,
        snapshot: MappedRamSnapshot,
        key: bytes,
        pages: Mapping[str, MemorySource] | None = None,
        original: Snapshot | None = None,
    ) -> None:
        self.snapshot = snapshot
        self.source = snapshot.source
        self._original = snapshot if original is None else original
        self._key = key
        self.size = os.fstat(self.source.fd).st_size
        self._buffers: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        areas: list[_Area] = []
        self._tails: list[MappedRamBlock] = []
        for block in snapshot.blocks.values():
            if block.external:
                continue
            if block.length % PAGE:
                self._tails.append(block)
            if block.length >= PAGE:
                end = block.pages_offset + block.length // PAGE * PAGE
                areas.append(
                    _Area(
                        block.pages_offset,
                        end,
                        Block.of(block.layout),
                        block.bitmap,
                        block.name,
                        block.page_size,
                        None if pages is None else pages[block.name],
                    )
                )
        self._areas = sorted(areas, key=lambda area: area.start)
        self._starts = [area.start for area in self._areas]

    @staticmethod
    def fits(snapshot: Snapshot) -> bool:
        """Return whether a snapshot is such a file as it is, and need not be converted."""
        return (
            isinstance(snapshot, MappedRamSnapshot)
            and not snapshot.stream.background
            and not snapshot.source.is_device
            and all(
                block.external or block.pages_offset % PAGE == 0
                for block in snapshot.blocks.values()
            )
        )

    @property
    def data_pages(self) -> int:
        """The most pages that are stored, from the bitmaps."""
        # A page of the guest may be smaller than one of the store, and then counts as one.
        return sum(
            block.data_pages * -(-block.page_size // PAGE)
            for block in self.snapshot.blocks.values()
            if not block.external
        )

    @property
    def data_bytes(self) -> int:
        """The pages of RAM with data, in bytes."""
        return sum(
            block.data_pages * block.page_size
            for block in self.snapshot.blocks.values()
            if not block.external
        )

    def spans(self, same: bytes | None) -> Iterator[Span]:
        """Yield the whole file in order. ``same`` has, for each piece, whether it is the parent's."""
        count = -(-self.size // PIECE)
        number = 0
        while number < count:
            if same is not None and same[number]:
                end = same.find(0, number)
                end = count if end < 0 else end
                yield Span(number * PIECE, min(end * PIECE, self.size), same=True)
            else:
                end = count if same is None else same.find(1, number)
                end = count if end < 0 else end
                yield from self._unequal(number * PIECE, min(end * PIECE, self.size))
            number = end

    def _unequal(self, start: int, end: int) -> Iterator[Span]:
        while start < end:
            data = self._next_data(start, end)
            stop = end if data == end else data // PIECE * PIECE
            if stop > start:
                yield Span(start, stop, hole=True)
            else:
                stop = min(end, start // CHUNK * CHUNK + CHUNK)
                yield Span(start, stop)
            start = stop

    def read(self, span: Span, digest: Callable[[Data], bytes]) -> Chunk:
        """Read a span of at most CHUNK bytes. Give the result to :meth:`release`.

        Raises SnapshotTruncated if the file has become shorter, TargetError.
        """
        start, end = span.start, span.end
        chunk = Chunk(start, end, self._buffer())
        assert chunk.buffer is not None
        data = memoryview(chunk.buffer)[: end - start]
        self._fill(data, start)
        self._clear_tails(data, start)
        at = start
        for area, low, high in self._areas_in(start, end):
            chunk.extents += _extents(data[at - start : low - start], at)
            part = data[low - start : high - start]
            examined = examine_pages(self._key, area.block, area.bitmap, low - area.start, part)
            chunk.pages.append(PagePart(low // PAGE, part, examined))
            at = high
        chunk.extents += _extents(data[at - start :], at)
        chunk.digests = b"".join(
            digest(data[piece : piece + PIECE]) for piece in range(0, end - start, PIECE)
        )
        return chunk

    def release(self, chunk: Chunk) -> None:
        """Take the memory of a chunk back; its pages are not used any more."""
        chunk.pages.clear()
        if chunk.buffer is not None:
            self._buffers.put(chunk.buffer)
            chunk.buffer = None

    def _areas_in(self, start: int, end: int) -> Iterator[tuple[_Area, int, int]]:
        """Yield the areas in bytes ``[start, end)``, and which bytes of these they are."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        for number in range(first, len(self._areas)):
            area = self._areas[number]
            if area.start >= end:
                return
            low, high = max(area.start, start), min(area.end, end)
            if low < high:
                yield area, low, high

    def _next_data(self, start: int, end: int) -> int:
        """Return the first byte from ``start`` on that may have data, at most ``end``."""
        found = next_data(self.source.fd, start, end)
        for area, low, high in self._areas_in(start, found):
            if area.source is None:
                continue
            page, stop = ((at - area.start) // area.page_size for at in (low, high))
            if not area.bitmap[page]:
                page = area.bitmap.run_end(page, stop)
            if page < stop:
                return max(area.start + page * area.page_size, start)
        return found

    def _buffer(self) -> bytearray:
        try:
            return self._buffers.get_nowait()
        except queue.Empty:
            return bytearray(CHUNK)

    def _fill(self, data: memoryview, start: int) -> None:
        """Read the bytes from ``start`` on."""
        self._fill_from_file(data, start)
        for area, low, high in self._areas_in(start, start + len(data)):
            if area.source is None:
                continue
            try:
                area.source.read_into(data[low - start : high - start], low - area.start)
            except OSError as error:
                raise error_from_errno(
                    error.errno or errno.EIO, self._original.source, area.name
                ) from error

    def _fill_from_file(self, data: memoryview, start: int) -> None:
        """Read the bytes of the file from ``start`` on; those of holes become zeros."""
        end, at = start + len(data), start
        fd = self.source.fd
        while at < end:
            low = next_data(fd, at, end)
            data[at - start : low - start] = _ZEROS[: low - at]
            high = low
            while high < end:
                high = next_hole(fd, high, end)
                after = next_data(fd, high, end)
                if after - high > _JOINED or after == end:
                    break
                high = after
            self._read_at(data[low - start : high - start], low)
            at = high

    def _clear_tails(self, data: memoryview, start: int) -> None:
        """Make zeros of pages with clear bits in the last bytes of blocks, which are not a store page."""
        for block in self._tails:
            size = block.page_size
            for page in range(block.length // PAGE * PAGE // size, block.num_pages):
                at = block.pages_offset + page * size - start
                if 0 <= at < len(data) and not block.bitmap[page]:
                    data[at : at + size] = _ZEROS[:size]

    def _read_at(self, data: memoryview, offset: int) -> None:
        have = 0
        while have < len(data):
            try:
                got = os.preadv(self.source.fd, [data[have:]], offset + have)
            except OSError as error:
                raise target_error(
                    error, "cannot read", self.source.name, position=offset + have
                ) from error
            if got == 0:
                raise SnapshotTruncated("the file has become shorter", offset=offset + have)
            have += got


def _extents(data: memoryview, offset: int) -> list[Extent]:
    """Return the bytes that are not zeros, as few extents; whole zero pages of the file lie between."""
    if len(data) == 0 or bytes(data) == _ZEROS[: len(data)]:
        return []
    bounds = [0, *range(PAGE - offset % PAGE, len(data), PAGE), len(data)]
    found: list[tuple[int, int]] = []
    for start, end in pairwise(bounds):
        if bytes(data[start:end]) == _ZEROS[: end - start]:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return [Extent(offset + start, bytes(data[start:end])) for start, end in found]
