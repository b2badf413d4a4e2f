"""Read parts of a stored file ahead, without getting in the way of its readers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from pyqmigrate.io.threads import start_thread
from pyqmigrate.store.frames import FrameId

if TYPE_CHECKING:
    from pyqmigrate.store.stored_file import StoredFile

__all__ = ["Prefetch"]

_TOGETHER = 4  # frames of one request: a reader waits for no more than that


class Prefetch:
    """One pass over ranges of a file: see :meth:`StoredFile.prefetch`."""

    def __init__(
        self,
        file: StoredFile,
        workers: int,
        stop: threading.Event,
        decompress: bool,
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

    def run(self, ranges: Iterable[tuple[int, int]]) -> int:
        work = self._requests(ranges)
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

    def _work(self, work: Iterator[_Request]) -> None:
        frames = self._file.frames
        while not self._stop.is_set() and self._error is None:
            try:
                frames.wait_until_idle(self._stop)
                with self._lock:
                    request = next(work, None)
                if request is None:
                    return
                if self._decompress:
                    frames.load(request.frames, demand=False)
                else:
                    self._fetch(request.frames)
                with self._lock:
                    self._count += len(request.frames)
                if self._done is not None:
                    for offset, length in request.finish():
                        self._done(offset, length)
            except BaseException as error:
                self._error = self._error or error

    def _fetch(self, frames: list[FrameId]) -> None:
        packs = self._file.frames.packs
        if frames:
            pack = frames[0][0]
            footer = packs.footer(pack)
            packs.fetch(pack, [footer.frame(number) for _, number in frames])

    def _requests(self, ranges: Iterable[tuple[int, int]]) -> Iterator[_Request]:
        """Yield requests of frames that follow each other in a pack; each frame in one of them."""
        seen: set[FrameId] = set()
        for offset, length in ranges:
            whole = _Range(offset, length, self._lock)
            found: list[FrameId] = []
            for frame in self._file.frames_of([(offset, length)]):
                if frame in seen:
                    continue
                seen.add(frame)
                if found and (frame != (found[-1][0], found[-1][1] + 1) or len(found) == _TOGETHER):
                    yield whole.part(found)
                    found = []
                found.append(frame)
            # The last one ends the range, also one without any frame that is new.
            yield whole.part(found, last=True)


class _Range:
    """A range, which is done when all of its requests are."""

    def __init__(self, offset: int, length: int, lock: threading.Lock) -> None:
        self.offset, self.length = offset, length
        self.left = 1  # the last one
        self.lock = lock

    def part(self, frames: list[FrameId], *, last: bool = False) -> _Request:
        if not last:
            self.left += 1
        return _Request(frames, self)


class _Request:
    """Frames that are read together."""

    def __init__(self, frames: list[FrameId], whole: _Range) -> None:
        self.frames = frames
        self._whole = whole

    def finish(self) -> list[tuple[int, int]]:
        """Return the range if this was the last of its requests."""
        with self._whole.lock:
            self._whole.left -= 1
            return [] if self._whole.left else [(self._whole.offset, self._whole.length)]
