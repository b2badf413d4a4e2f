"""Jobs: work that runs in the background and can be waited for, watched and cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from pyqmigrate.errors import JobTimeout
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.threads import start_thread

__all__ = ["Job", "Progress"]

_REPORT_EVERY = 0.1  # seconds between two calls of a progress callback

R = TypeVar("R", covariant=True)


@dataclass(frozen=True)
class Progress:
    """The progress of a job. ``bytes_done`` is guest memory processed, zero pages included.

    ``rate`` is in guest bytes per second since the start; ``bytes_moved`` counts bytes written to
    or read from the file.
    """

    bytes_done: int
    bytes_total: int
    data_pages: int
    zero_pages: int
    bytes_moved: int
    seconds: float
    rate: float


class Job(Generic[R]):
    """A save or a load in progress. All methods are thread-safe.

    It can be awaited, with the result of :meth:`result`. Cancelling the awaiting task cancels the
    job, and the task ends when everything is cleaned up. A job that was about to publish may have
    done so by then.

    ``work`` runs in a thread that the job starts, and returns the report. TargetError when no
    thread can be started; ``work`` is then not called.
    """

    def __init__(self, channels: Channels, total: int, work: Callable[[], R]) -> None:
        self._channels = channels
        self._total = total
        self._started = time.monotonic()
        self._ended: float | None = None
        self._done = threading.Event()
        self._result: R | None = None
        self._error: BaseException | None = None

        self._at_end: list[Callable[[], object]] = []
        self._lock = threading.Lock()

        def run() -> None:
            try:
                self._result = work()
            except BaseException as error:
                self._error = error
            finally:
                self._ended = time.monotonic()
                with self._lock:
                    self._done.set()
                for callback in self._at_end:
                    callback()

        self._thread = threading.Thread(target=run, name=channels.name)
        start_thread(self._thread)

    def cancel(self) -> None:
        """Ask the job to stop, without waiting. The channels stop within 100 ms. An fsync in progress
        completes first, and then nothing is published. Everything is cleaned up."""
        self._channels.cancel()

    def set_max_bandwidth(self, bytes_per_second: int) -> None:
        """Limit the bytes moved per second from now on; 0 is unlimited."""
        self._channels.set_rate(bytes_per_second)

    def at_end(self, callback: Callable[[], object]) -> Self:
        """Call ``callback`` when the job has ended, at once if it has; returns the job."""
        with self._lock:
            if not self._done.is_set():
                self._at_end.append(callback)
                return self
        callback()
        return self

    def done(self) -> bool:
        """Return whether the job has ended, successfully or not."""
        return self._done.is_set()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the job ends, successfully or not. Returns False after ``timeout`` seconds."""
        return self._done.wait(timeout)

    @property
    def progress(self) -> Progress:
        """The current progress."""
        totals = self._channels.totals()
        seconds = (self._ended or time.monotonic()) - self._started
        return Progress(
            bytes_done=totals.bytes_done,
            bytes_total=self._total,
            data_pages=totals.data_pages,
            zero_pages=totals.zero_pages,
            bytes_moved=totals.bytes_moved,
            seconds=seconds,
            rate=totals.bytes_done / seconds if seconds else 0.0,
        )

    def result(
        self, timeout: float | None = None, progress: Callable[[Progress], object] | None = None
    ) -> R:
        """Wait for the end and return the report, or raise the error of the job.

        ``timeout`` is in seconds; JobTimeout after it, and the job continues. ``progress`` is
        called on this thread, at most ten times a second and once after the end; an exception from
        it cancels the job and is raised here when the job has stopped. The one after the end cannot
        undo what the job made. Cancelled after :meth:`cancel`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._done.is_set():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise JobTimeout(f"the job has not ended after {timeout} s; it continues")
            # Never without a limit: a signal that arrives just before the thread sleeps is handled
            # only when it wakes.
            moment = _REPORT_EVERY if left is None else min(_REPORT_EVERY, left)
            if not self._done.wait(moment) and progress is not None:
                self._report(progress)
        self._thread.join()
        if self._error is not None:
            raise self._error
        if progress is not None:
            progress(self.progress)
        return self._result  # type: ignore[return-value]

    def __await__(self) -> Generator[Any, None, R]:
        # asyncio is slow to import, and most programs do not need it.
        from pyqmigrate.io.awaiting import end_of

        return end_of(self).__await__()

    def _report(self, progress: Callable[[Progress], object]) -> None:
        try:
            progress(self.progress)
        except BaseException:
            self.cancel()
            self._thread.join()
            raise

    def wait(self, progress: Callable[[Progress], object] | None = None) -> R:
        """Like :meth:`result`, but an exception that interrupts the wait (Ctrl-C) cancels the job
        first."""
        try:
            return self.result(progress=progress)
        except BaseException:
            self.cancel()
            self._thread.join()
            raise
