"""How much processor time the virtual CPUs of a guest get, before and during a save.

    clock = ProcessorClock(guest)     # begin to measure the guest as it usually is
    await clock.settle()              # it was measured for long enough
    clock.begin()                     # the save begins
    ...
    clock.slowdown()                  # 0.25: a quarter of the processor time was lost

A guest that waits does not compute: for QEMU to write a page that it wants to change, in a pause, or
because QEMU throttles it. So a guest that was busy before loses processor time. Its threads are QEMU's,
one for each virtual CPU, and Linux counts their time in ``/proc/PID/task/TID/schedstat`` (nanoseconds
on a processor). Page faults, and the second attempt at a write that faulted, are included, so this is a
lower bound: during a background snapshot of shared memory the guest may have lost much more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.guest.process import host_threads

__all__ = ["ProcessorClock"]

# Seconds of a measurement, at least and preferably. Linux updates the times at each tick, every 1 to 10 ms.
_LEAST_SECONDS = 0.05
_ENOUGH_SECONDS = 0.1
_LEAST_BUSY = 0.1  # of one processor: a guest that mostly waits has no speed to lose
_NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class _Reading:
    """Processor time of all threads, ``used``, at a time, ``at``; both in seconds."""

    at: float
    used: float


class ProcessorClock:
    """Measures from now on how much processor time the virtual CPUs of ``guest`` get.

    ``now`` is a clock in seconds. Raises nothing: what cannot be read is not known.
    """

    def __init__(self, guest: GuestInfo, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._threads: list[Path] = []
        if guest.running and guest.pid is not None:
            task = Path(f"/proc/{guest.pid}/task")
            self._threads = [
                task / str(thread) / "schedstat"
                for thread in host_threads(guest.pid, guest.processor_threads)
            ]
        self._first = self._read()
        self._usual: float | None = None
        self._begun: _Reading | None = None

    async def settle(self) -> None:
        """Wait until the usual speed was measured for a tenth of a second; usually that has gone by."""
        if self._first is not None and self._begun is None:
            await asyncio.sleep(max(self._first.at + _ENOUGH_SECONDS - self._now(), 0))

    def begin(self) -> None:
        """Note that the save begins: what was measured until now is the usual speed. Another call is
        another attempt, and does not change the usual speed."""
        if self._begun is None:
            self._usual = _rate(self._first, self._read())
        self._begun = self._read()

    def slowdown(self) -> float | None:
        """Return the share of its usual processor time, from 0 to 1, that the guest has lost since
        :meth:`begin`. None if that is not known, or if the guest was mostly idle before."""
        usual, during = self._usual, _rate(self._begun, self._read())
        if usual is None or during is None or usual < _LEAST_BUSY:
            return None
        return min(max(1 - during / usual, 0.0), 1.0)

    def _read(self) -> _Reading | None:
        return _reading(self._threads, self._now)


def _reading(threads: Collection[Path], now: Callable[[], float]) -> _Reading | None:
    try:
        used = sum(int(thread.read_text().split()[0]) for thread in threads)
    except (OSError, ValueError, IndexError):  # a CPU was removed, or QEMU has ended
        return None
    return _Reading(now(), used / _NANOSECONDS) if threads else None


def _rate(first: _Reading | None, last: _Reading | None) -> float | None:
    """Return the processors that were busy between two readings."""
    if first is None or last is None or last.at - first.at < _LEAST_SECONDS:
        return None
    return (last.used - first.used) / (last.at - first.at)
