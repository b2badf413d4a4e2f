"""What a worker is doing, in memory that it shares with its keeper.

The keeper reads it without the help of the worker: the answer to "who waits for what" does not depend
on a process that is stuck, stopped or dead. Each thread of the worker has a slot of its own, and
nothing is locked: a reader takes a slot that changes under its eyes again.

The log lists the reads of the worker in their order, while it is switched on: the working set of a guest.
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["SLOTS", "Activity", "Board", "LoggedRead", "Totals"]

SLOTS = 64
LOG_MAX = 1 << 17  # reads; 3 MiB, of which only what is used takes memory

_SLOT_BYTES = 128
_HEAD_BYTES = 4096
_LOG_START = _HEAD_BYTES + SLOTS * _SLOT_BYTES
# sequence (odd while it is written), unique, node, offset, started (ns), operation, length, pid, uid
_ACTIVITY = struct.Struct("=QQQQQIIII")
_COUNTS = struct.Struct("=QQQQ")
_COUNTS_AT = 64
_LOGGED_AT = 0
_PUSHED_AT = 8
_FETCHED_AT = 16
_NUMBER = struct.Struct("=Q")
_TWO_NUMBERS = struct.Struct("=QQ")
_ENTRY = struct.Struct("=QQQ")
_TRIES = 100


class Activity(NamedTuple):
    """A request that a thread is at. ``started_ns`` is a time of the monotonic clock."""

    unique: int
    node: int
    offset: int
    started_ns: int
    operation: int
    length: int
    pid: int
    uid: int


class Totals(NamedTuple):
    """Sums over all workers: requests, reads, bytes read, and requests that failed."""

    requests: int
    reads: int
    bytes: int
    failed: int


class LoggedRead(NamedTuple):
    node: int
    offset: int
    length: int


class Board:
    """The shared memory. It is made before the worker is forked."""

    def __init__(self, *, logging: bool = False) -> None:
        self.logging = logging
        self._memory = mmap.mmap(-1, _LOG_START + LOG_MAX * _ENTRY.size)
        self._log_lock = threading.Lock()

    def begin(self, slot: int, activity: Activity) -> None:
        """Show a request in a slot of the calling thread."""
        place = _HEAD_BYTES + slot * _SLOT_BYTES
        sequence = _NUMBER.unpack_from(self._memory, place)[0] | 1
        _NUMBER.pack_into(self._memory, place, sequence)
        _ACTIVITY.pack_into(self._memory, place, sequence, *activity)
        _NUMBER.pack_into(self._memory, place, sequence + 1)

    def end(self, slot: int, read: int = -1, failed: bool = False) -> None:
        """Clear a slot and count its request; ``read`` is the bytes of a READ."""
        place = _HEAD_BYTES + slot * _SLOT_BYTES
        sequence = _NUMBER.unpack_from(self._memory, place)[0] | 1
        _ACTIVITY.pack_into(self._memory, place, sequence, 0, 0, 0, 0, 0, 0, 0, 0)
        _NUMBER.pack_into(self._memory, place, sequence + 1)
        counts = place + _COUNTS_AT
        requests, reads, size, failures = _COUNTS.unpack_from(self._memory, counts)
        _COUNTS.pack_into(
            self._memory,
            counts,
            requests + 1,
            reads + (read >= 0),
            size + max(read, 0),
            failures + failed,
        )

    def activities(self) -> list[Activity]:
        """Return the requests that are being served, the oldest first."""
        found = [activity for slot in range(SLOTS) if (activity := self._activity(slot))]
        return sorted(found, key=lambda activity: activity.started_ns)

    def is_idle(self) -> bool:
        """Return whether no request is being served."""
        return not any(
            _ACTIVITY.unpack_from(self._memory, _HEAD_BYTES + slot * _SLOT_BYTES)[4]
            for slot in range(SLOTS)
        )

    def clear(self) -> dict[int, int]:
        """Clear all slots after the death of the worker; return since when (ns) each request waited,
        by its number."""
        since = {activity.unique: activity.started_ns for activity in self.activities()}
        for slot in range(SLOTS):
            place = _HEAD_BYTES + slot * _SLOT_BYTES
            _ACTIVITY.pack_into(self._memory, place, *[0] * 9)
        return since

    def totals(self) -> Totals:
        counts = [
            _COUNTS.unpack_from(self._memory, _HEAD_BYTES + slot * _SLOT_BYTES + _COUNTS_AT)
            for slot in range(SLOTS)
        ]
        return Totals(*(sum(column) for column in zip(*counts, strict=True)))

    def log(self, node: int, offset: int, length: int) -> None:
        """Add a read to the log, if it is on and not full."""
        if not self.logging:
            return
        with self._log_lock:
            count = self.logged
            if count < LOG_MAX:
                place = _LOG_START + count * _ENTRY.size
                _ENTRY.pack_into(self._memory, place, node, offset, length)
                _NUMBER.pack_into(self._memory, _LOGGED_AT, count + 1)

    @property
    def pushed(self) -> int:
        """How many ranges of the list to push are done."""
        count: int = _NUMBER.unpack_from(self._memory, _PUSHED_AT)[0]
        return count

    @pushed.setter
    def pushed(self, count: int) -> None:
        _NUMBER.pack_into(self._memory, _PUSHED_AT, count)

    def count_fetch(self, on_demand: bool) -> None:
        """Count a request to a store; ``on_demand``: a reader waits for the answer."""
        with self._log_lock:
            fetched, demanded = self.fetched
            _TWO_NUMBERS.pack_into(self._memory, _FETCHED_AT, fetched + 1, demanded + on_demand)

    @property
    def fetched(self) -> tuple[int, int]:
        """How many requests to a store there were, and how many of them on demand."""
        fetched, demanded = _TWO_NUMBERS.unpack_from(self._memory, _FETCHED_AT)
        return fetched, demanded

    @property
    def logged(self) -> int:
        """How many reads the log has."""
        count: int = _NUMBER.unpack_from(self._memory, _LOGGED_AT)[0]
        return min(count, LOG_MAX)

    def logged_reads(self) -> Iterator[LoggedRead]:
        """Yield the reads of the log in their order."""
        for number in range(self.logged):
            yield LoggedRead._make(
                _ENTRY.unpack_from(self._memory, _LOG_START + number * _ENTRY.size)
            )

    def _activity(self, slot: int) -> Activity | None:
        place = _HEAD_BYTES + slot * _SLOT_BYTES
        for _ in range(_TRIES):
            before, *fields = _ACTIVITY.unpack_from(self._memory, place)
            after = _NUMBER.unpack_from(self._memory, place)[0]
            if before == after and before % 2 == 0:
                activity = Activity._make(fields)
                return activity if activity.operation else None
        return None  # of a worker that was killed in the middle of a change
