"""A stored snapshot as the plain file that it shows: bytes, holes, and the files beside it."""

from __future__ import annotations

import functools
import struct
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pyqmigrate.format.store.config import PAGE
from pyqmigrate.format.store.snapshot import StoredSnapshot
from pyqmigrate.io.plain_file import Bytes
from pyqmigrate.store.damage import DamagedPack
from pyqmigrate.store.frames import FrameId, Frames
from pyqmigrate.store.prefetching import Prefetch

__all__ = ["StoredFile"]

_PAGES_TOGETHER = 1 << 14  # whose footers are read together
_FOOTERS_TOGETHER = 128
_AROUND = 64  # pages: a frame
_WORD = struct.Struct("<Q")
_ZEROS = memoryview(bytes(64 * PAGE))
_FILLED = 16  # pages


class _Part(NamedTuple):
    """Pages ``[page, page + npages)`` of the file: consecutive ones of a frame, from ``first`` on."""

    page: int
    npages: int
    frame: FrameId
    first: int


class _Span(NamedTuple):
    """Pages ``[page, page + npages)`` of the file: consecutive ones of a pack, from ``number`` on."""

    page: int
    npages: int
    pack: bytes
    number: int


class StoredFile:
    """The file that a stored snapshot shows: a :class:`~pyqmigrate.io.plain_file.PlainFile`.

    All methods may be called by several threads at once, in the process that opened the store. Every
    page is compared with its digest before it is given out: what is damaged is a
    :class:`~pyqmigrate.store.damage.DamagedPack`, an OSError with EIO. ``name`` is the snapshot's.
    """

    def __init__(
        self,
        snapshot: StoredSnapshot,
        frames: Frames,
        companions: Callable[[], Mapping[str, bytes]] = dict,
        release: Callable[[], None] | None = None,
        hold: Callable[[], Callable[[], None] | None] | None = None,
    ) -> None:
        """``companions`` returns the files beside it that are not in the snapshot; ``release`` is called
        when the file is closed; it ends what keeps the snapshot from being removed. ``hold`` begins that
        again and returns what ends it, or None if the snapshot is gone. The frames are borrowed."""
        self.snapshot = snapshot
        self.name = snapshot.head.name
        self.size = snapshot.head.size
        self.mtime_ns = snapshot.head.mtime_ns
        self.frames = frames
        self._more = companions
        self._companions: Mapping[str, bytes] | None = None
        self._release = release
        self._hold_again = hold
        self._data: tuple[Sequence[int], Sequence[int]] | None = None
        self._lock = threading.Lock()

    @property
    def companions(self) -> Mapping[str, bytes]:
        """The files beside it, by suffix: ``.seal``, always, and ``.vm.json`` and ``.workingset``."""
        if self._companions is None:
            found = {".seal": self.snapshot.seal, **self.snapshot.companions, **self._more()}
            self._companions = found
        return self._companions

    def read(self, offset: int, length: int) -> Bytes:
        """Return ``length`` bytes at ``offset``; fewer only at the end. Raises TargetError."""
        views = self.views(offset, length)
        return views[0] if len(views) == 1 else b"".join(views)

    def views(self, offset: int, length: int) -> list[Bytes]:
        """Return what :meth:`read` does in parts, most of which are not copied: for writev()."""
        end = min(offset + length, self.size)
        if not 0 <= offset < end:
            return []
        first, last = offset // PAGE, -(-end // PAGE)
        try:
            parts = list(self._parts(first, last))
            contents = self.frames.load(part.frame for part in parts)
        except DamagedPack as error:
            raise error.of(self.name) from error
        found: list[Bytes] = list(self._pages(first, last, parts, contents))
        if self._covered(first, last):
            found = [self._overlaid(found, first, last)]
        if offset > first * PAGE:
            found[0] = memoryview(found[0])[offset - first * PAGE :]
        if end < last * PAGE:
            found[-1] = memoryview(found[-1])[: end - last * PAGE]
        return found

    def cheap_range(self, offset: int, length: int) -> tuple[int, int]:
        """Return the start and end of the bytes around a range that was just read, 256 KiB more on each
        side at most, for which nothing has to be read or decompressed any more. Whole pages."""
        end = min(offset + length, self.size)
        first, last = offset // PAGE, -(-end // PAGE)
        low = max(first - _AROUND, 0)
        high = min(last + _AROUND, -(-self.size // PAGE))
        for span in self._spans(low, high):
            for part in self._split(span) if self.frames.packs.has_footer(span.pack) else (span,):
                if isinstance(part, _Part) and self.frames.is_kept(part.frame):
                    continue
                if part.page < first:
                    low = min(first, part.page + part.npages)
                if part.page + part.npages > last:
                    return low * PAGE, min(max(last, part.page) * PAGE, self.size)
        return low * PAGE, min(high * PAGE, self.size)

    def next_data(self, offset: int) -> int | None:
        """Return the first byte at or after ``offset`` that is not in a hole; None for none."""
        if not 0 <= offset < self.size:
            return None
        starts, ends = self._data_ranges()
        k = bisect_right(ends, offset)
        return None if k == len(starts) else max(offset, starts[k])

    def next_hole(self, offset: int) -> int:
        """Return the first byte at or after ``offset`` that is in a hole, or the end of the file."""
        starts, ends = self._data_ranges()
        k = bisect_right(starts, offset) - 1
        return min(max(offset, ends[k] if k >= 0 else 0), self.size)

    def frames_of(self, ranges: Iterable[tuple[int, int]]) -> Iterator[FrameId]:
        """Yield the frames that have bytes of ``ranges``, of (offset, length) each: each frame once,
        in that order. Raises TargetError."""
        seen: set[FrameId] = set()
        for offset, length in ranges:
            end = -(-min(offset + length, self.size) // PAGE)
            for first in range(offset // PAGE, end, _PAGES_TOGETHER):
                for part in self._parts(first, min(first + _PAGES_TOGETHER, end)):
                    if part.frame not in seen:
                        seen.add(part.frame)
                        yield part.frame

    def load_footers(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Read ahead the footers of the packs that have bytes of ``ranges``, several at once from a remote
        place: without them, each costs a request of its own when it is needed. The first 128 packs.

        Raises DamagedPack, TargetError.
        """
        packs = (
            span.pack
            for offset, length in ranges
            for span in self._spans(offset // PAGE, -(-min(offset + length, self.size) // PAGE))
        )
        self.frames.load_footers(_first(_FOOTERS_TOGETHER, packs), demand=False)

    def prefetch(
        self,
        ranges: Iterable[tuple[int, int]],
        *,
        workers: int = 3,
        stop: threading.Event | None = None,
        decompress: bool = True,
        gives_way: bool = True,
        done: Callable[[int, int], None] | None = None,
    ) -> int:
        """Read ``ranges``, of (offset, length) each, ahead; return the number of frames that were.

        It ends when all are read, or ``stop`` is set. In the given order, by ``workers`` threads, in
        small requests, each of which waits until no reader waits for a frame, unless it does not give
        way. ``done`` is called by a
        worker with each range that is ready, soon after it is. Without ``decompress``, frames only get
        into the local cache of packs. Raises TargetError.
        """
        try:
            return Prefetch(
                self, workers, stop or threading.Event(), decompress, gives_way, done
            ).run(ranges)
        except DamagedPack as error:
            raise error.of(self.name) from error

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the file that are not holes: offset and length, in order."""
        starts, ends = self._data_ranges()
        for start, end in zip(starts, ends, strict=True):
            yield start, min(end, self.size) - start

    def close(self) -> None:
        """Close it; the store stays open. Idempotent."""
        self._hold_again = None
        self._end_hold()

    def let_go(self) -> None:
        """Allow that :func:`remove` removes it, until :meth:`hold`. Idempotent. A snapshot of an object store
        stays held."""
        if self._hold_again is not None:
            self._end_hold()

    def hold(self) -> bool:
        """Keep it from being removed again; return False if it was. Raises TargetError."""
        if self._hold_again is None or self._release is not None:
            return True
        self._release = self._hold_again()
        return self._release is not None

    def _end_hold(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> StoredFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parts(self, first: int, last: int) -> Iterator[_Part]:
        """Yield where the pages ``[first, last)`` that are in packs are, in order."""
        spans = list(self._spans(first, last))
        self.frames.load_footers(span.pack for span in spans)
        for span in spans:
            yield from self._split(span)

    def _spans(self, first: int, last: int) -> Iterator[_Span]:
        """Yield the runs of pages within ``[first, last)`` that are in packs, in order."""
        runs = self.snapshot.runs
        packs = self.snapshot.packs
        for k in range(max(0, bisect_right(runs.firsts, first) - 1), len(runs)):
            start = max(first, runs.firsts[k])
            end = min(last, runs.firsts[k] + runs.counts[k])
            if start < end:
                number = runs.pages[k] + start - runs.firsts[k]
                yield _Span(start, end - start, packs[runs.packs[k]], number)
            elif runs.firsts[k] >= last:
                return

    def _split(self, span: _Span) -> Iterator[_Part]:
        """Yield the parts of a run, one for each frame."""
        page, npages, pack, number = span
        footer = self.frames.packs.footer(pack)
        while npages:
            try:
                frame = footer.frame_of(number)
            except IndexError as error:
                raise DamagedPack(
                    f"it has {len(footer)} pages, and the snapshot needs page {number}",
                    pack,
                    store=self.frames.packs.place.name,
                ) from error
            inside = number - frame.first
            count = min(npages, frame.npages - inside)
            yield _Part(page, count, (pack, frame.number), inside)
            page, npages, number = page + count, npages - count, number + count

    def _pages(
        self, first: int, last: int, parts: Iterable[_Part], contents: Mapping[FrameId, bytes]
    ) -> Iterator[bytes | memoryview]:
        """Yield the pages ``[first, last)`` in parts, none of them empty; extents are left out."""
        page = first
        for part in parts:
            yield from self._between(page, part.page)
            content = memoryview(contents[part.frame])
            yield content[part.first * PAGE : (part.first + part.npages) * PAGE]
            page = part.page + part.npages
        yield from self._between(page, last)

    def _between(self, first: int, last: int) -> Iterator[bytes | memoryview]:
        """Yield pages that are in no pack: those that repeat a word, and zeros."""
        if first >= last:
            return
        fills = self.snapshot.fills
        page = first
        for k in range(max(0, bisect_right(fills.firsts, first) - 1), len(fills)):
            start = max(first, fills.firsts[k])
            end = min(last, fills.firsts[k] + fills.counts[k])
            if start < end:
                yield from _repeated(_ZEROS, start - page)
                yield from _repeated(_filled(fills.words[k]), end - start)
                page = end
            elif fills.firsts[k] >= last:
                break
        yield from _repeated(_ZEROS, last - page)

    def _extents(self, first: int, last: int) -> Iterator[tuple[int, memoryview]]:
        """Yield the offset and the bytes of what is not stored as pages, within the pages."""
        extents = self.snapshot.extents
        k = max(0, bisect_right(extents, first * PAGE, key=lambda extent: extent.offset) - 1)
        for extent in extents[k:]:
            if extent.offset >= last * PAGE:
                break
            skipped = max(0, first * PAGE - extent.offset)
            data = memoryview(extent.data)[skipped : last * PAGE - extent.offset]
            if data:
                yield extent.offset + skipped, data

    def _overlaid(self, found: Iterable[Bytes], first: int, last: int) -> bytearray:
        """Return pages with the extents over them."""
        pages = bytearray().join(found)
        for offset, data in self._extents(first, last):
            start = offset - first * PAGE
            pages[start : start + len(data)] = data
        return pages

    def _covered(self, first: int, last: int) -> bool:
        return next(self._extents(first, last), None) is not None

    def _data_ranges(self) -> tuple[Sequence[int], Sequence[int]]:
        """Return the starts and ends of all data, in bytes; made when it is first needed."""
        with self._lock:
            if self._data is None:
                self._data = _merged(self.snapshot, self.size)
            return self._data


def _first(count: int, packs: Iterable[bytes]) -> list[bytes]:
    """Return the first packs, each of them once."""
    found: dict[bytes, None] = {}
    for pack in packs:
        found[pack] = None
        if len(found) == count:
            break
    return list(found)


@functools.lru_cache(maxsize=64)
def _filled(word: int) -> memoryview:
    """Return pages that repeat a word."""
    return memoryview(_WORD.pack(word) * (_FILLED * PAGE // _WORD.size))


def _repeated(pattern: memoryview, npages: int) -> Iterator[memoryview]:
    """Yield so many pages of a pattern of equal pages."""
    length = npages * PAGE
    for _ in range(length // len(pattern)):
        yield pattern
    if length % len(pattern):
        yield pattern[: length % len(pattern)]


def _merged(snapshot: StoredSnapshot, size: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return the ranges of a snapshot's file that are data: joined, in order, whole pages."""
    runs, fills = snapshot.runs, snapshot.fills
    pages = list(zip(runs.firsts, runs.counts, strict=True))
    pages += zip(fills.firsts, fills.counts, strict=True)
    for extent in snapshot.extents:
        first = extent.offset // PAGE
        pages.append((first, -(-(extent.offset + len(extent.data)) // PAGE) - first))
    pages.sort()  # three sorted lists, which it merges
    starts, ends = array("Q"), array("Q")
    end = -1
    for first, count in pages:
        if first > end:
            starts.append(first * PAGE)
            ends.append(0)
        end = max(end, first + count)
        ends[-1] = end * PAGE
    if ends and ends[-1] > size:
        ends[-1] = size
    return starts, ends
