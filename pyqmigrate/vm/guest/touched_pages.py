"""Record the working set of an instantly restored guest: the pages it touches, in order.

QEMU's page table is polled every few milliseconds. A page that enters it was touched, or is a neighbour
of one that was: after a read fault the kernel maps 64 KiB around the page, as far as these pages are in
the page cache, or all of a huge page of the cache. The page cache itself (``mincore``) would show far
more, because each fault on a cold file reads ahead, and because other guests read the same file: after a
random walk over 300 MiB it had 1900 MiB.

    with RestoredRam(pid, blocks) as ram:
        recording = record_working_set(ram, seconds=10)
    write_working_set(place, identity, specs, recording.working_set, seconds=recording.seconds)

Do not read the guest's memory during the recording: pages read from outside enter its page table too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyqmigrate.errors import GuestMemoryError
from pyqmigrate.format.working_set import RUNS_MAX, TouchedRun, WorkingSet
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.pagemap import add_bits, list_runs
from pyqmigrate.vm.guest.changed_pages import RestoredRam

__all__ = ["Recording", "record_working_set"]

_INTERVAL = 0.01  # seconds between two polls, at least
_SHARE = 0.05  # of one processor, at most, for polling
_JOINED = 4  # pages: shorter gaps become part of a run
_RUN_MAX = (1 << 32) - 1  # pages


@dataclass(frozen=True)
class Recording:
    """The result of a recording: ``looks`` polls in ``seconds``. ``complete`` is False if the
    guest ended, or touched more than a working set can list."""

    working_set: WorkingSet
    seconds: float
    looks: int
    complete: bool


def record_working_set(
    ram: RestoredRam,
    seconds: float,
    *,
    stop: threading.Event | None = None,
    known: Sequence[Bitmap] | None = None,
) -> Recording:
    """Watch the blocks of ``ram`` for ``seconds``, or until ``stop`` is set. Blocks.

    ``known`` are pages of each block that are not recorded. Takes at most a twentieth of one
    processor. The recording ends when the guest ends. Raises GuestMemoryError if the guest's pages
    cannot be examined at the start.
    """
    stop = stop or threading.Event()
    started = time.monotonic()
    deadline = started + seconds
    sizes = [block.length // block.page_size for block in ram.blocks]
    now, seen, fresh = ([Bitmap(npages) for npages in sizes] for _ in range(3))
    working_set, looks, complete = WorkingSet(), 0, True
    try:
        for pages, skipped, scratch in zip(seen, known or (), fresh, strict=False):
            add_bits(pages, skipped, scratch)
        while True:
            began = time.thread_time()
            try:
                ram.look_for_present(now)
            except GuestMemoryError:
                if looks == 0:
                    raise
                complete = False
                break
            looks += 1
            for number in range(len(sizes)):
                if not add_bits(seen[number], now[number], fresh[number]):
                    continue
                for run in _join(number, list_runs(fresh[number])):
                    if len(working_set) == RUNS_MAX:
                        complete = False
                        break
                    working_set.append(run)
            pause = max(_INTERVAL, (time.thread_time() - began) / _SHARE)
            left = deadline - time.monotonic()
            if left <= 0 or not complete or stop.wait(min(pause, left)):
                break
    finally:
        for bitmap in (*now, *seen, *fresh):
            bitmap.close()
    return Recording(working_set, time.monotonic() - started, looks, complete)


def _join(block: int, runs: Iterator[tuple[int, int]]) -> Iterator[TouchedRun]:
    """Yield the runs of one poll, in order; runs with a short gap between them are joined."""
    first, end = 0, 0
    for start, npages in runs:
        if end and start - end <= _JOINED and start + npages - first <= _RUN_MAX:
            end = start + npages
            continue
        if end:
            yield TouchedRun(block, first, end - first)
        first, end = start, start + npages
    if end:
        yield TouchedRun(block, first, end - first)
