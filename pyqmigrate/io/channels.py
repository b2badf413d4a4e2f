"""Channels: the threads that move the pages of a job.

They take ranges of pages from one list until it is empty. Each range is one call into the core,
which runs without the GIL and polls the job's state.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pyqmigrate.argument_types import check
from pyqmigrate.core import CHUNK, Channel, Fault, JobState, Totals, error_from_fault
from pyqmigrate.errors import Cancelled, UsageError
from pyqmigrate.io.threads import start_thread

if TYPE_CHECKING:
    from pyqmigrate.io.bitmap import Bitmap

__all__ = ["MAX_CHANNELS", "Channels", "Range", "check_channels", "selected_ranges", "split_ranges"]

MAX_CHANNELS = 255
_RANGE = 32 << 20  # bytes of a block that one call moves
_CHUNKS_A_RANGE = 8
_RANGES_A_BLOCK = 8192  # more than so many, and the ranges get larger


class Range(NamedTuple):
    """Pages ``[first, first + npages)`` of block number ``block``."""

    block: int
    first: int
    npages: int


def split_ranges(block: int, npages: int, page_size: int) -> Iterator[Range]:
    """Split a block into the ranges that channels take."""
    step = max(_RANGE, npages * page_size // _RANGES_A_BLOCK)
    step = -(-step // CHUNK) * CHUNK // page_size
    for first in range(0, npages, step):
        yield Range(block, first, min(step, npages - first))


def selected_ranges(block: int, selection: Bitmap, page_size: int) -> Iterator[Range]:
    """Yield the ranges of a block, whole chunks of the core, that contain every set bit."""
    chunk = CHUNK // page_size
    pages, first = selection.npages, 0
    while first < pages:
        if not selection[first]:
            found = selection.run_end(first, pages)
            if found == pages:
                return
            first = found // chunk * chunk
        end = first + chunk
        while end - first < _CHUNKS_A_RANGE * chunk and end < pages and selection[end]:
            end += chunk
        yield Range(block, first, min(end, pages) - first)
        first = end


def check_channels(channels: int) -> int:
    """Return ``channels``. UsageError unless it is 1 to 255."""
    if isinstance(channels, bool) or not isinstance(channels, int):
        raise UsageError(f"channels must be a number from 1 to {MAX_CHANNELS}, not {channels!r}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise UsageError(f"channels must be 1 to {MAX_CHANNELS}, not {channels}")
    return channels


class Channels:
    """The threads of one job, which work through ranges, and its state in the core.

    ``core`` is that state; ``count`` is the number of threads that :meth:`run` starts. ``observer``, if
    any, is called by each thread at its end: with its number, its start and its end
    (``time.monotonic()``), and the number of pages that it went through.
    """

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self.name = name
        self.core = JobState()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._siblings: list[Channels] = []
        self.observer: Callable[[int, float, float, int], object] | None = None

    def sibling(self, name: str) -> Channels:
        """Return as many channels, with totals of their own, that are cancelled with these."""
        sibling = Channels(self.count, name)
        self.join(sibling)
        return sibling

    def join(self, other: Channels) -> None:
        """Cancel ``other`` whenever these are cancelled."""
        self._siblings.append(other)
        if self.cancelled:
            other.cancel()

    def cancel(self) -> None:
        """Stop the threads; the core polls at least every 4 MiB."""
        self.core.cancel()
        for sibling in self._siblings:
            sibling.cancel()

    @property
    def cancelled(self) -> bool:
        return self.core.cancelled

    def set_rate(self, bytes_per_second: int) -> None:
        """Limit the bytes that all channels together move per second; 0 is unlimited. UsageError
        unless the number has 64 bits."""
        check("a bandwidth", bytes_per_second, int)
        if not 0 <= bytes_per_second < 1 << 64:
            raise UsageError(f"a bandwidth of {bytes_per_second} bytes a second is impossible")
        self.core.set_rate(bytes_per_second)

    def totals(self) -> Totals:
        return self.core.totals()

    def run_readers(
        self,
        ranges: Iterable[Range],
        call: Callable[[Channel, Range], int],
        block_names: list[str],
        failed: Callable[[int, Fault, str], BaseException],
    ) -> None:
        """Work through ``ranges`` of snapshots that are read as memory; ``call`` is one call into the core.

        ``failed(number, fault, block)`` returns the exception for pages that cannot be read: the errno,
        where, and the name of the block. Raises that, MemoryError, Cancelled.
        """

        def read(channel: Channel, item: Range) -> int:
            rc = int(call(channel, item))
            if rc == 0:
                return 0
            if self.cancelled:
                raise Cancelled("cancelled")
            if not channel.fault.in_memory:
                raise MemoryError
            raise failed(-rc, channel.fault, block_names[item.block])

        self.run(ranges, read, "a snapshot", block_names)

    def run(
        self,
        ranges: Iterable[Range],
        move: Callable[[Channel, Range], int],
        target: str,
        block_names: list[str],
    ) -> None:
        """Work through ``ranges``; ``move(channel, range)`` is one call into the core.

        Returns when every thread has ended. Raises the first failure, or Cancelled.
        """
        pending = iter(ranges)

        def work(number: int) -> None:
            started_at, pages = time.monotonic(), 0
            try:
                with Channel() as channel:
                    while True:
                        with self._lock:
                            item = next(pending, None)
                        if item is None:
                            break
                        rc = move(channel, item)
                        pages += item.npages
                        if rc < 0:
                            raise error_from_fault(
                                rc, channel.fault, target, block_names[item.block]
                            )
            except BaseException as error:
                self._stop(error)
            if self.observer is not None:
                self.observer(number, started_at, time.monotonic(), pages)

        threads = [
            threading.Thread(target=work, args=(n,), name=f"{self.name}-{n}")
            for n in range(self.count)
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
