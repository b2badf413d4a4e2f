"""Jobs, and the channels that move their pages.

A :class:`Job` runs in threads of its own from the moment it is made; whoever started it may wait,
look at its progress, or cancel it. Channels take ranges of pages from one list until it is empty;
each range is one call into the core, which runs without the GIL and polls the job's atomics.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from pyqmigrate import _core
from pyqmigrate.argument_types import check
from pyqmigrate.errors import (
    Cancelled,
    GuestMemoryError,
    JobTimeout,
    NoSpace,
    PyqmigrateError,
    TargetError,
    UsageError,
)
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.threads import start_thread

__all__ = [
    "MAX_CHANNELS",
    "Channels",
    "Job",
    "Progress",
    "Range",
    "check_channels",
    "core_block",
    "split_ranges",
    "failure",
]

MAX_CHANNELS = 255
_RANGE = 32 << 20  # bytes of a block that one call moves
_RANGES_A_BLOCK = 8192  # more than so many, and the ranges get larger
_REPORT_EVERY = 0.1  # seconds between two calls of a progress callback

R = TypeVar("R", covariant=True)


@dataclass(frozen=True)
class Progress:
    """How far a job is. Bytes are guest memory dealt with, zero pages included.

    ``rate`` is in guest bytes a second since the start; ``bytes_moved`` what went to or came from
    the file.
    """

    bytes_done: int
    bytes_total: int
    data_pages: int
    zero_pages: int
    bytes_moved: int
    seconds: float
    rate: float


@dataclass(frozen=True)
class Range:
    """Pages ``[first, first + npages)`` of block number ``block``."""

    block: int
    first: int
    npages: int


def split_ranges(block: int, npages: int, page_size: int) -> Iterator[Range]:
    """Cut a block into the ranges that channels take."""
    step = max(_RANGE, npages * page_size // _RANGES_A_BLOCK)
    step = -(-step // _core.lib.QM_CHUNK) * _core.lib.QM_CHUNK // page_size
    for first in range(0, npages, step):
        yield Range(block, first, min(step, npages - first))


def core_block(layout: BlockLayout) -> Any:
    """Length and place of a block's pages as the core's ``struct qm_block *``."""
    block = _core.ffi.new("struct qm_block *")
    block.len = layout.length
    block.pages_offset = layout.pages_offset
    block.page_size = layout.page_size
    return block


def check_channels(channels: int) -> int:
    """``channels`` itself, or UsageError unless it is 1 to 255."""
    if isinstance(channels, bool) or not isinstance(channels, int):
        raise UsageError(f"channels is a number from 1 to {MAX_CHANNELS}, not {channels!r}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise UsageError(f"channels is {channels}; 1 to {MAX_CHANNELS} are possible")
    return channels


class Channels:
    """The core's side of one job: its atomics, and N threads that work through ranges."""

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self.name = name
        self.core = _core.ffi.gc(_core.lib.qm_job_create(), _core.lib.qm_job_destroy)
        if self.core == _core.ffi.NULL:
            raise MemoryError
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._siblings: list[Channels] = []

    def sibling(self, name: str) -> Channels:
        """As many channels with totals of their own, cancelled together with these."""
        sibling = Channels(self.count, name)
        self.join(sibling)
        return sibling

    def join(self, other: Channels) -> None:
        """Cancel ``other`` whenever these are cancelled."""
        self._siblings.append(other)
        if self.cancelled:
            other.cancel()

    def cancel(self) -> None:
        """Stop as soon as the core looks, at least every 4 MiB."""
        _core.lib.qm_job_cancel(self.core)
        for sibling in self._siblings:
            sibling.cancel()

    @property
    def cancelled(self) -> bool:
        return bool(_core.lib.qm_job_cancelled(self.core))

    def set_rate(self, bytes_per_second: int) -> None:
        """Limit what all channels move together; 0 is no limit. UsageError out of 64 bits."""
        check("a bandwidth", bytes_per_second, int)
        if not 0 <= bytes_per_second < 1 << 64:
            raise UsageError(f"a bandwidth of {bytes_per_second} bytes a second is impossible")
        _core.lib.qm_job_set_rate(self.core, bytes_per_second)

    def totals(self) -> Any:
        """The core's ``struct qm_totals``."""
        totals = _core.ffi.new("struct qm_totals *")
        _core.lib.qm_job_totals(self.core, totals)
        return totals

    def run(
        self,
        ranges: Iterable[Range],
        move: Callable[[Any, Range, Any], int],
        target: str,
        block_names: list[str],
    ) -> None:
        """Work through ``ranges``; ``move(channel, range, fault)`` is one call into the core.

        Returns when every thread has ended. Raises what the first failure was, or Cancelled.
        """
        pending = iter(ranges)

        def work() -> None:
            channel = _core.lib.qm_channel_create()
            fault = _core.ffi.new("struct qm_fault *")
            try:
                if channel == _core.ffi.NULL:
                    raise MemoryError
                while True:
                    with self._lock:
                        item = next(pending, None)
                    if item is None:
                        return
                    rc = move(channel, item, fault)
                    if rc:
                        raise failure(rc, fault, target, block_names[item.block])
            except BaseException as error:
                self._stop(error)
            finally:
                _core.lib.qm_channel_destroy(channel)

        threads = [
            threading.Thread(target=work, name=f"{self.name}-{n}") for n in range(self.count)
        ]
        started = []
        try:
            for thread in threads:
                start_thread(thread)
                started.append(thread)
        except BaseException as error:
            self._stop(error)
        for thread in started:
            thread.join()
        if self._failure is not None:
            raise self._failure
        if self.cancelled:
            raise Cancelled("cancelled")

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            if self._failure is None and not self.cancelled:
                self._failure = error
        self.cancel()


def failure(rc: int, fault: Any, target: str, block: str) -> PyqmigrateError:
    """The exception for a negative return of the core."""
    number = -rc
    if number == errno.ECANCELED:
        return Cancelled("cancelled")
    if number in (errno.ENOMEM, errno.EINVAL) and not fault.at:
        return TargetError(number, f"cannot transfer pages of block {block!r}", target)
    if fault.in_memory:
        gone = "went away" if number == errno.EFAULT else "cannot be used"
        return GuestMemoryError(number, f"guest memory {gone} at byte {fault.at:#x}", block=block)
    what = f"cannot transfer pages of block {block!r}"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(what, target, errno=number, position=fault.at)
    return TargetError(number, what, target, position=fault.at)


class Job(Generic[R]):
    """A save or a load under way. All methods are thread-safe.

    On an event loop it can be awaited, which gives what :meth:`result` gives. To cancel the task
    that awaits it cancels the job, and the task ends when everything is cleaned up. A job that was
    about to publish may have done so by then.

    ``work`` does the whole job in a thread of the job's own and returns its report. Raises
    TargetError where no thread can be started; then ``work`` does not run.
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
        """Ask the job to stop; does not wait. The channels stop within 100 ms; an fsync under way
        ends first, and then nothing is published. It is all cleaned up."""
        self._channels.cancel()

    def set_max_bandwidth(self, bytes_per_second: int) -> None:
        """Limit the bytes moved a second from now on; 0 is no limit."""
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
        """Whether the job has ended, well or not."""
        return self._done.is_set()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end, whatever it is; whether it came within ``timeout`` seconds."""
        return self._done.wait(timeout)

    @property
    def progress(self) -> Progress:
        """Where the job is now."""
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
        """Wait for the end and return the report, or raise what went wrong.

        ``timeout`` is in seconds; JobTimeout after it, and the job goes on. ``progress`` is called
        on this thread, at most ten times a second and once at the end; what it raises cancels the
        job and is raised here when the job has stopped. Cancelled after :meth:`cancel`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._done.is_set():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise JobTimeout(f"the job has not ended after {timeout} s; it goes on")
            # Never without a limit: a signal that comes while a thread is about to sleep would be
            # heard only when it wakes.
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
        # asyncio takes long to import, and most programs do without.
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
        """Like :meth:`result`, but what interrupts the wait (Ctrl-C) cancels the job first."""
        try:
            return self.result(progress=progress)
        except BaseException:
            self.cancel()
            self._thread.join()
            raise
