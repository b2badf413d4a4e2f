"""The frames of packs, decompressed and verified, the last used ones kept in memory."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import TypeAlias

from pyqmigrate.format.digest import DIGEST_SIZE
from pyqmigrate.format.store.config import PAGE
from pyqmigrate.format.store.pack import BasePage, Frame, PackFooter
from pyqmigrate.format.store.zstd import decompress
from pyqmigrate.io.store_pages import page_digests, xor_into
from pyqmigrate.store.damage import DamagedPack
from pyqmigrate.store.packs import Packs

__all__ = ["FrameId", "Frames"]

FrameId: TypeAlias = tuple[bytes, int]  # a pack's digest, and a frame's number in it

_Span: TypeAlias = "tuple[bytes, list[Frame]]"  # frames of a pack that one request reads
_Xored: TypeAlias = "list[tuple[bytes, Frame, memoryview]]"
_Read: TypeAlias = "tuple[BaseException | None, _Xored]"

_REQUESTS = 32  # at once, to a remote place: most of their time is the way there and back
_PROCESSORS = len(os.sched_getaffinity(0))
_GAP = 64 << 10  # bytes between frames that one request to a remote place reads over


class Frames:
    """The frames of ``packs``; at most ``limit`` bytes of them are kept.

    All methods may be called by several threads at once. A frame that one thread reads is awaited by
    the others. Every page is compared with its digest before it is given out.
    """

    def __init__(self, packs: Packs, limit: int = 64 << 20) -> None:
        self.packs = packs
        self._limit = limit
        self._kept: OrderedDict[FrameId, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._pending: dict[FrameId, Future[bytes]] = {}
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._demands = 0  # loads that a reader waits for, now
        self._pool: ThreadPoolExecutor | None = None

    def load(self, wanted: Iterable[FrameId], *, demand: bool = True) -> dict[FrameId, bytes]:
        """Return the content of frames. With ``demand`` a reader waits, and prefetching pauses.

        Raises DamagedPack, TargetError.
        """
        found: dict[FrameId, bytes] = {}
        mine: dict[FrameId, Future[bytes]] = {}
        theirs: dict[FrameId, Future[bytes]] = {}
        with self._lock:
            for frame in wanted:
                if frame in found or frame in mine or frame in theirs:
                    continue
                kept = self._kept.get(frame)
                if kept is not None:
                    self._kept.move_to_end(frame)
                    found[frame] = kept
                elif frame in self._pending:
                    theirs[frame] = self._pending[frame]
                else:
                    mine[frame] = self._pending[frame] = Future()
            if not mine and not theirs:
                return found
            self._demands += demand
        try:
            if mine:
                self._read_all(mine, demand)
                found.update((frame, future.result()) for frame, future in mine.items())
            failed = []
            for frame, future in theirs.items():
                if future.exception() is None:
                    found[frame] = future.result()
                else:
                    failed.append(frame)
            if failed:  # in another thread, perhaps with less patience
                found.update(self.load(failed, demand=False))
        finally:
            with self._lock:
                self._demands -= demand
                if not self._demands:
                    self._idle.notify_all()
        return found

    def is_kept(self, frame: FrameId) -> bool:
        """Return whether a frame is in memory, so that loading it costs nothing."""
        return frame in self._kept

    def wait_until_idle(self, stop: threading.Event) -> None:
        """Return when no reader waits for a frame, or ``stop`` is set."""
        with self._lock:
            while self._demands and not stop.is_set():
                self._idle.wait(0.05)

    def load_footers(self, packs: Iterable[bytes], *, demand: bool = True) -> None:
        """Read the footers of packs, several at once from a remote place. With ``demand`` a reader
        waits."""
        missing = [pack for pack in dict.fromkeys(packs) if not self.packs.has_footer(pack)]
        if missing and self.packs.place.directory is None:
            list(self._executor().map(partial(self.packs.footer, demand=demand), missing))

    def fetch(self, wanted: Iterable[FrameId]) -> None:
        """Have frames in the local cache of packs, compressed; nothing is done without one.

        Raises DamagedPack, TargetError.
        """
        if self.packs.cache is not None:
            spans = self._spans(wanted)
            read = partial(self.packs.frames, demand=False)
            list(self._executor().map(read, *zip(*spans, strict=True)))

    def verify(self, pack: bytes, frame: Frame, compressed: memoryview) -> None:
        """Compare the pages of a frame, whose bytes are at hand, with their digests. Nothing is kept
        but bases. Raises DamagedPack, TargetError."""
        bases = self._load_bases([(pack, frame)]) if frame.xor else {}
        self._verified(pack, frame, compressed, bases)

    def close(self) -> None:
        """Forget all frames, and end the threads. Idempotent."""
        self.packs.stop.set()
        with self._lock:
            pool, self._pool = self._pool, None
            self._kept.clear()
            self._kept_bytes = 0
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_REQUESTS, "pyqmigrate-store")
            return self._pool

    def _read_all(self, wanted: dict[FrameId, Future[bytes]], demand: bool) -> None:
        """Read frames and complete their futures; all of them, whatever fails. Raises the first
        error.

        Plain frames are completed first, because XOR frames wait for them: two threads whose frames
        are XORed with pages of each other's do not wait for each other.
        """
        errors: list[BaseException] = []
        try:
            spans = self._spans(wanted)
            if len(spans) > 1 and self.packs.place.directory is None:
                read = partial(self._read_span, demand=demand)
                done = list(self._executor().map(read, spans))
            else:
                done = self._read_local(spans, demand)
            errors += [error for error, _ in done if error is not None]
            xored = [frame for _, frames in done for frame in frames]
            if xored:
                bases = self._load_bases([(pack, frame) for pack, frame, _ in xored])
                errors += filter(
                    None, (self._finish(pack, frame, data, bases) for pack, frame, data in xored)
                )
        except BaseException as error:
            errors.append(error)
        finally:
            why = errors[0] if errors else RuntimeError("a frame was not read")
            for frame, future in wanted.items():
                if not future.done():
                    self._complete(frame, why)
        if errors:
            raise errors[0]

    def _read_local(self, spans: Sequence[_Span], demand: bool) -> list[_Read]:
        """Read spans of a place that answers at once: what takes time is decompressing. If one reader
        waits and nothing else is done, two processors do it."""

        def read(some: Sequence[_Span]) -> list[_Read]:
            return [self._read_span(span, demand=demand) for span in some]

        if not (demand and self._demands == 1 and _PROCESSORS > 1):
            return read(spans)
        here, there = _halves(spans)
        if not there:
            return read(here)
        try:
            reading = self._executor().submit(read, there)
        except RuntimeError:  # no room for a thread
            return read(spans)
        return read(here) + reading.result()

    def _spans(self, wanted: Iterable[FrameId]) -> list[_Span]:
        """Return what one request each reads: a pack, and the frames wanted of it, in order."""
        gap = _GAP if self.packs.place.directory is None else 0
        spans: list[_Span] = []
        for pack, frames in groupby(sorted(wanted), key=lambda frame: frame[0]):
            footer = self.packs.footer(pack)
            together: list[Frame] = []
            for _, number in frames:
                frame = _frame(footer, pack, number)
                if not together or frame.offset - _end(together[-1]) > gap:
                    together = []
                    spans.append((pack, together))
                together.append(frame)
        return spans

    def _read_span(self, span: _Span, *, demand: bool) -> _Read:
        """Read frames of one pack with one request, and complete the futures of the plain ones.

        Return the first error, and what is left: XOR frames with their compressed bytes.
        """
        pack, frames = span
        try:
            contents = self.packs.frames(pack, frames, demand=demand)
        except BaseException as error:
            for frame in frames:
                self._complete((pack, frame.number), error)
            return error, []
        first: BaseException | None = None
        xored: _Xored = []
        for frame, compressed in zip(frames, contents, strict=True):
            if frame.xor:
                xored.append((pack, frame, compressed))
            else:
                first = first or self._finish(pack, frame, compressed, {})
        return first, xored

    def _finish(
        self, pack: bytes, frame: Frame, compressed: memoryview, bases: dict[FrameId, bytes]
    ) -> BaseException | None:
        """Decompress and verify a frame, and complete its future; return the error."""
        try:
            content = self._content(pack, frame, compressed, bases)
        except BaseException as error:
            self._complete((pack, frame.number), error)
            return error
        self._complete((pack, frame.number), content)
        return None

    def _complete(self, frame: FrameId, result: bytes | BaseException) -> None:
        with self._lock:
            future = self._pending.pop(frame, None)
            if isinstance(result, bytes):
                self._keep(frame, result)
        if future is None or future.done():
            return
        if isinstance(result, bytes):
            future.set_result(result)
        else:
            future.set_exception(result)

    def _keep(self, frame: FrameId, content: bytes) -> None:
        if frame not in self._kept:
            self._kept[frame] = content
            self._kept_bytes += len(content)
        while self._kept_bytes > self._limit and len(self._kept) > 1:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])

    def _content(
        self, pack: bytes, frame: Frame, compressed: memoryview, bases: dict[FrameId, bytes]
    ) -> bytes:
        """Decompress and verify a frame; if it came from the cache and is damaged, read it again."""
        try:
            return self._verified(pack, frame, compressed, bases)
        except DamagedPack:
            if self.packs.cache is None:
                raise
            fresh = self.packs.frames(pack, [frame], fresh=True)[0]
            return self._verified(pack, frame, fresh, bases)

    def _verified(
        self, pack: bytes, frame: Frame, compressed: memoryview, bases: dict[FrameId, bytes]
    ) -> bytes:
        footer = self.packs.footer(pack)
        store = self.packs.place.name
        try:
            content = decompress(compressed, frame.npages * PAGE)
        except ValueError as error:
            raise DamagedPack(str(error), pack, frame.number, frame.first, store=store) from error
        if frame.xor:
            pages = self._base_pages(pack, frame, bases)
            xor_into(pages, content)
            content = bytes(pages)
        digests = footer.digests[
            frame.first * DIGEST_SIZE : (frame.first + frame.npages) * DIGEST_SIZE
        ]
        found = page_digests(self.packs.config.key, content)
        if found != digests:
            page = frame.first + _first_difference(found, digests)
            why = "the page is not what its digest was made of"
            raise DamagedPack(why, pack, frame.number, page, store=store)
        return content

    def _load_bases(self, frames: Iterable[tuple[bytes, Frame]]) -> dict[FrameId, bytes]:
        """Return the frames that XOR frames refer to."""
        bases = []
        for pack, frame in frames:
            footer = self.packs.footer(pack)
            bases += [footer.base(frame, frame.first + n) for n in range(frame.npages)]
        self.load_footers(base.pack for base in bases if base is not None)
        wanted = dict.fromkeys(
            (base.pack, below.number)
            for base in bases
            if base is not None and (below := self._plain_frame(base)) is not None
        )
        return self.load(wanted, demand=False)

    def _plain_frame(self, base: BasePage) -> Frame | None:
        """Return the plain frame that a base is in, None if there is none."""
        try:
            frame = self.packs.footer(base.pack).frame_of(base.page)
        except IndexError:
            return None
        return None if frame.xor else frame

    def _base_pages(self, pack: bytes, frame: Frame, bases: dict[FrameId, bytes]) -> bytearray:
        """Return the base of each page of an XOR frame; zeros for a page without one."""
        footer = self.packs.footer(pack)
        places: list[tuple[FrameId, int] | None] = []
        for page in range(frame.first, frame.first + frame.npages):
            base = footer.base(frame, page)
            if base is None:
                places.append(None)
                continue
            below = self._plain_frame(base)
            if below is None:
                why = f"its base, page {base.page} of pack {base.pack.hex()}, is not a plain page"
                raise DamagedPack(why, pack, frame.number, page, store=self.packs.place.name)
            places.append(((base.pack, below.number), base.page - below.first))
        pages = bytearray(frame.npages * PAGE)
        for n, place, count in _joined(places):
            if place is not None:
                content = memoryview(bases[place[0]])[place[1] * PAGE :][: count * PAGE]
                pages[n * PAGE : (n + count) * PAGE] = content
        return pages


def _halves(spans: Sequence[_Span]) -> tuple[list[_Span], list[_Span]]:
    """Return the first and the second half of the frames."""
    left = (sum(len(frames) for _, frames in spans) + 1) // 2
    first: list[_Span] = []
    second: list[_Span] = []
    for pack, frames in spans:
        if frames[:left]:
            first.append((pack, frames[:left]))
        if frames[left:]:
            second.append((pack, frames[left:]))
        left = max(left - len(frames), 0)
    return first, second


def _end(frame: Frame) -> int:
    return frame.offset + frame.length


def _first_difference(left: bytes, right: bytes) -> int:
    """Return the number of the first digest that differs."""
    steps = range(0, len(left), DIGEST_SIZE)
    return next(n for n, k in enumerate(steps) if left[k:][:DIGEST_SIZE] != right[k:][:DIGEST_SIZE])


def _joined(
    places: Sequence[tuple[FrameId, int] | None],
) -> Iterator[tuple[int, tuple[FrameId, int] | None, int]]:
    """Join places that follow each other in a frame: yield the first one's number, it, and how many
    they are."""
    start = 0
    while start < len(places):
        place, end = places[start], start + 1
        while end < len(places) and places[end] == (place and (place[0], place[1] + end - start)):
            end += 1
        yield start, place, end - start
        start = end


def _frame(footer: PackFooter, pack: bytes, number: int) -> Frame:
    try:
        return footer.frame(number)
    except IndexError as error:
        raise DamagedPack("it has no such frame", pack, number) from error
