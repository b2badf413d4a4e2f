"""Read parts of a stored file ahead, without getting in the way of its readers.

A local store is read in small requests, and the next one waits while a reader does. A store that is far
away answers late, however little is asked for: many requests are under way at once, and they grow as long
as the answers come quickly. Where they do not, the link is narrow, and readers go first there, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from pyqmigrate.io.threads import start_thread
from pyqmigrate.store.frames import FrameId

if TYPE_CHECKING:
    from pyqmigrate.store.stored_file import StoredFile

__all__ = ["Prefetch"]

_FEW = 4  # frames that are read together: a reader waits for no more than that
# With 8 workers, 48 MiB of pages: what is read must not be dropped before it is used.
_MANY = 24
_QUICK = 0.1  # seconds for frames that are read together
_RANGES = 4096  # whose footers are read together


class Prefetch:
    """One pass over ranges of a file: see :meth:`StoredFile.prefetch`."""

    def __init__(
        self,
        file: StoredFile,
        workers: int,
        stop: threading.Event,
        decompress: bool,
        gives_way: bool,
        done: Callable[[int, int], None] | None,
    ) -> None:
        self._file = file
        self._workers = workers
        self._stop = stop
        self._decompress = decompress
        self._done = done
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._count = 0
        self._remote = file.frames.packs.place.directory is None
        self._together = _FEW
        self._may_wait = self._gives_way = gives_way

    def run(self, ranges: Iterable[tuple[int, int]]) -> int:
        work = self._batches(ranges)
        threads = [
            threading.Thread(target=self._work, args=(work,), name="pyqmigrate-prefetch")
            for _ in range(max(0, self._workers - 1))
        ]
        started = []
        try:
            for thread in threads:
                start_thread(thread)
                started.append(thread)
            self._work(work)
        except BaseException as error:
            self._error = self._error or error
        for thread in started:
            thread.join()
        if self._error is not None:
            raise self._error
        return self._count

    def _work(self, work: Iterator[_Batch]) -> None:
        frames = self._file.frames
        while not self._stop.is_set() and self._error is None:
            try:
                if self._gives_way:
                    frames.wait_until_idle(self._stop)
                with self._lock:
                    batch = next(work, None)
                if batch is None:
                    return
                began = time.monotonic()
                if self._decompress:
                    frames.load(batch.frames, demand=False)
                else:
                    frames.fetch(batch.frames)
                with self._lock:
                    self._count += len(batch.frames)
                    if self._remote and batch.frames:
                        self._adapt(time.monotonic() - began)
                    done = batch.finish()
                if self._done is not None:
                    for offset, length in done:
                        self._done(offset, length)
            except BaseException as error:
                self._error = self._error or error

    def _adapt(self, seconds: float) -> None:
        """Read more together if that was quick, and less if it was not. What only gets into the cache
        is not urgent, and always gives way."""
        quick = seconds < _QUICK
        self._together = min(2 * self._together, _MANY) if quick else max(self._together // 2, _FEW)
        self._gives_way = self._may_wait and not (quick and self._decompress)

    def _batches(self, ranges: Iterable[tuple[int, int]]) -> Iterator[_Batch]:
        """Yield frames to read together, in the order of the ranges; each frame in one batch."""
        seen: set[FrameId] = set()
        batch = _Batch()
        pending = iter(ranges)
        while some := list(islice(pending, _RANGES)):
            if self._remote:
                self._file.load_footers(some)
            for offset, length in some:
                whole = _Range(offset, length)
                for frame in self._file.frames_of([(offset, length)]):
                    if frame in seen:
                        continue
                    seen.add(frame)
                    batch.add(frame, whole)
                    if len(batch.frames) >= self._together:
                        yield batch
                        batch = _Batch()
                batch.end(whole)
                if len(batch) >= _MANY:  # ranges without frames are ready, too
                    yield batch
                    batch = _Batch()
        yield batch


class _Range:
    """A range, which is done when all of it was in batches that are read."""

    def __init__(self, offset: int, length: int) -> None:
        self.offset, self.length = offset, length
        self.batches = 0  # that are not read
        self.ended = False  # no other batch will have a part of it


class _Batch:
    """Frames that are read together, and the ranges that they are of. For one thread at a time."""

    def __init__(self) -> None:
        self.frames: list[FrameId] = []
        self._ranges: dict[_Range, None] = {}

    def __len__(self) -> int:
        """Return the number of ranges."""
        return len(self._ranges)

    def add(self, frame: FrameId, whole: _Range) -> None:
        self.frames.append(frame)
        self._join(whole)

    def end(self, whole: _Range) -> None:
        """Note that nothing more of a range follows."""
        self._join(whole)
        whole.ended = True

    def _join(self, whole: _Range) -> None:
        if whole not in self._ranges:
            self._ranges[whole] = None
            whole.batches += 1

    def finish(self) -> list[tuple[int, int]]:
        """Return the ranges that are done with this batch, in their order."""
        done = []
        for whole in self._ranges:
            whole.batches -= 1
            if whole.ended and not whole.batches:
                done.append((whole.offset, whole.length))
        return done
