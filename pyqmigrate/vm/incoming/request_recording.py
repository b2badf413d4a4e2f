"""Record the working set of a guest that runs from a snapshot of a store, by what is read of it.

The page table shows the pages that the guest touched. But each fault on a view reads more than a page,
up to 1 MiB, and the guest waits until all of it is there: a restore that has only the touched pages
ahead still waits for 166 reads, and one that has what was read waits for none.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterable, Sequence

from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.format.working_set import RUNS_MAX, TouchedRun, WorkingSet, WorkingSetLine
from pyqmigrate.io.view import SharedView
from pyqmigrate.vm.incoming.recording import Recorder, WorkingSetReport

__all__ = ["RequestRecorder", "working_set_of"]


class RequestRecorder(Recorder):
    """Records the reads of the snapshot ``identity``, whose blocks are ``layouts``, through ``view``.

    ``place`` is what :meth:`~pyqmigrate.io.view.View.check_recordable` returned.
    """

    def __init__(
        self,
        view: SharedView,
        place: str,
        identity: SnapshotId,
        layouts: Sequence[BlockLayout],
        seconds: float,
    ) -> None:
        super().__init__()
        self._place, self._identity = place, identity
        self._layouts, self._seconds = layouts, seconds
        self._view = view.share()  # the restore closes its own

    def start(self) -> None:
        """Start to wait; the reads since the view was made count. Raises TargetError."""
        try:
            self._start(self._record)
        except BaseException:
            self._view.close()
            raise

    def _record(self) -> WorkingSetReport:
        started = time.monotonic()
        try:
            stopped = self._stop.wait(self._seconds)
            seconds = time.monotonic() - started
            self._check_kept()
            working_set, whole = working_set_of(self._view.view.requests(), self._layouts)
            specs = [BlockSpec(b.name, b.length, b.page_size) for b in self._layouts]
            line = WorkingSetLine.of(self._identity, specs, len(working_set), seconds)
            self._view.view.write_working_set(line.encode(working_set) + working_set.encode())
        finally:
            self._view.close()
        return WorkingSetReport(self._place, working_set.npages, seconds, whole and not stopped)


def working_set_of(
    requests: Iterable[tuple[int, int]], layouts: Sequence[BlockLayout]
) -> tuple[WorkingSet, bool]:
    """Return the pages in reads of ``(file offset, length)``, and whether these are all of them.

    What is not memory is left out, and so is a read that repeats another. The limits of a working set
    end it.
    """
    numbers = sorted(
        (number for number, layout in enumerate(layouts) if not layout.external),
        key=lambda number: layouts[number].pages_offset,
    )
    starts = [layouts[number].pages_offset for number in numbers]
    left = sum(layout.length // layout.page_size for layout in layouts)
    working_set, seen = WorkingSet(), set()
    for offset, length in requests:
        if (offset, length) in seen:
            continue
        seen.add((offset, length))
        place = max(bisect.bisect_right(starts, offset) - 1, 0)
        for number in numbers[place:]:
            run = _run_in(number, layouts[number], offset, offset + length)
            if run is None:
                if layouts[number].pages_offset >= offset + length:
                    break
                continue
            if len(working_set) == RUNS_MAX or run.npages > left:
                return working_set, False
            left -= run.npages
            working_set.append(run)
    return working_set, True


def _run_in(number: int, layout: BlockLayout, start: int, end: int) -> TouchedRun | None:
    """Return the pages of a block that bytes ``[start, end)`` of the file are in, if any."""
    start = max(start - layout.pages_offset, 0)
    end = min(end - layout.pages_offset, layout.length)
    if start >= end:
        return None
    first = start // layout.page_size
    return TouchedRun(number, first, -(-end // layout.page_size) - first)
