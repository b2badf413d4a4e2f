"""Reads of a source: at once, or by threads if it is slow; what is asked for does not wait for the rest."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.format.postcopy.records import RecordData
from pyqmigrate.page_server.sources import PageSource

if TYPE_CHECKING:  # only slow sources need threads
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["Read", "Reading"]


@dataclass(frozen=True, slots=True)
class Read:
    """Pages ``[first, end)`` of a block. ``demand``: the guest waits for them, since ``since``, in
    nanoseconds of the monotonic clock."""

    block: int
    first: int
    end: int
    demand: bool
    since: int = 0


class Reading:
    """Reads under way. ``fd`` is readable when one has ended in a thread; -1 if they end at once.

    ``window`` is how many reads ahead should be under way, ``ahead`` how many are.
    """

    def __init__(self, source: PageSource) -> None:
        self._source = source
        self._done: collections.deque[tuple[int, Read, RecordData | Exception]] = (
            collections.deque()
        )
        self._connection = 0
        self.fd = -1
        self.window = max(source.readers, 1)
        self.ahead = 0
        self._pools: list[ThreadPoolExecutor] = []
        if source.readers:
            from concurrent.futures import ThreadPoolExecutor

            self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            # Of their own, so that a read that the guest waits for starts at once.
            for name in ("pyqmigrate-ahead", "pyqmigrate-demand"):
                self._pools.append(ThreadPoolExecutor(source.readers, name))

    def start(self, read: Read) -> None:
        """Start a read; its result is one of :meth:`ended` later."""
        if not read.demand:
            self.ahead += 1
        if not self._pools:
            self._done.append((self._connection, read, self._read(read)))
            return
        number = self._connection
        future = self._pools[read.demand].submit(self._read, read)
        future.add_done_callback(lambda ended: self._end(number, read, ended))

    def forget(self) -> None:
        """Drop the results of all reads that were started: they are of a connection that broke. Those in
        threads go on."""
        self._connection += 1
        self.ahead = 0

    def _read(self, read: Read) -> RecordData | Exception:
        try:
            return self._source.read(read.block, read.first, read.end - read.first)
        except (PyqmigrateError, OSError) as error:
            return error

    def _end(self, number: int, read: Read, ended: Future[RecordData | Exception]) -> None:
        if not ended.cancelled():
            self._done.append((number, read, ended.result()))
            os.eventfd_write(self.fd, 1)  # close() waits for all threads before it closes this

    def ended(self) -> Iterator[tuple[Read, RecordData | Exception]]:
        """Yield the reads that have ended, each with its pages, or why there are none."""
        if self.fd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.fd)
        while self._done:
            number, read, result = self._done.popleft()
            if number != self._connection:
                continue
            if not read.demand:
                self.ahead -= 1
            yield read, result

    @property
    def has_results(self) -> bool:
        """Whether :meth:`ended` has something to yield, of which ``fd`` says nothing."""
        return self.fd < 0 and bool(self._done)

    def close(self) -> None:
        """End the threads, after the reads that they are at. Idempotent."""
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)
        self._pools = []
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
