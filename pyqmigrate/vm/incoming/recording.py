"""Record the working set of a guest while it runs, from the load of its snapshot on.

    recorder = WorkingSetRecorder(place, identity, seconds=10)
    recorder.start(pid, blocks)              # before the guest runs
    report = await recorder.result           # after 10 seconds, or recorder.stop()

The recording goes on in a thread, for the given time, until :meth:`~WorkingSetRecorder.stop`, or
until the guest ends; the pages seen until then are written to ``SNAPSHOT.workingset``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.errors import UsageError
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.mapped_ram import BlockSpec
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.pagemap import add_bits
from pyqmigrate.io.threads import start_thread
from pyqmigrate.io.working_set_file import check_working_set_place, write_working_set
from pyqmigrate.vm.guest.changed_pages import RestoredBlock, RestoredRam
from pyqmigrate.vm.guest.touched_pages import record_working_set

__all__ = ["WorkingSetRecorder", "WorkingSetReport"]


@dataclass(frozen=True)
class WorkingSetReport:
    """A recorded working set: the file ``path``, its number of ``pages``, and for how many ``seconds``
    the guest was watched. ``complete`` is False if the guest ended, or touched more than the file can
    list."""

    path: Path
    pages: int
    seconds: float
    complete: bool


def _copy(bitmap: Bitmap) -> Bitmap:
    copy, new = Bitmap(bitmap.npages), Bitmap(bitmap.npages)
    add_bits(copy, bitmap, new)
    new.close()
    return copy


class WorkingSetRecorder:
    """Records the working set of one guest of the snapshot ``identity`` at ``snapshot``.

    ``result`` is the report, once :meth:`start` was called; it may be awaited any number of times,
    and to cancel it stops the recording. Raises UsageError or TargetError if the file cannot be
    written beside the snapshot. Needs a running event loop.
    """

    def __init__(self, snapshot: Path, identity: SnapshotId, seconds: float) -> None:
        self._snapshot, self._identity, self._seconds = snapshot, identity, seconds
        self._place = check_working_set_place(snapshot)
        self._stop = threading.Event()
        self._dropped = False
        self._future: concurrent.futures.Future[WorkingSetReport] = concurrent.futures.Future()
        self.result: asyncio.Future[WorkingSetReport] = asyncio.wrap_future(self._future)
        self.result.add_done_callback(self._ended)

    def start(
        self, pid: int, blocks: Sequence[RestoredBlock], known: Sequence[Bitmap] | None = None
    ) -> None:
        """Start to watch the blocks of the process ``pid``; raises GuestMemoryError, TargetError.

        ``known`` are pages of each block that are not recorded. They are copied.
        """
        ram = RestoredRam(pid, blocks)
        try:
            known = None if known is None else [_copy(bitmap) for bitmap in known]
            thread = threading.Thread(
                target=self._run, args=(ram, known), name="pyqmigrate-record", daemon=True
            )
            start_thread(thread)
        except BaseException:
            ram.close()
            raise

    def stop(self) -> None:
        """Stop watching; what was seen is written. Does not wait. Idempotent."""
        self._stop.set()

    def drop(self) -> None:
        """Stop watching; nothing is written unless that is happening already."""
        self._dropped = True
        self._stop.set()

    def _ended(self, result: asyncio.Future[WorkingSetReport]) -> None:
        self.stop()
        if not result.cancelled():
            result.exception()  # retrieved: the caller need not await it

    def _run(self, ram: RestoredRam, known: Sequence[Bitmap] | None) -> None:
        self._future.set_running_or_notify_cancel()
        try:
            self._future.set_result(self._record(ram, known))
        except BaseException as error:
            self._future.set_exception(error)

    def _record(self, ram: RestoredRam, known: Sequence[Bitmap] | None) -> WorkingSetReport:
        with ram:
            recording = record_working_set(ram, self._seconds, stop=self._stop, known=known)
            for bitmap in known or ():
                bitmap.close()
            specs = [BlockSpec(b.name, b.length, b.page_size) for b in ram.blocks]
        self._check_snapshot()
        write_working_set(
            self._place, self._identity, specs, recording.working_set, seconds=recording.seconds
        )
        return WorkingSetReport(
            self._place, recording.working_set.npages, recording.seconds, recording.complete
        )

    def _check_snapshot(self) -> None:
        """Raise UsageError if the file of that name is no longer the restored snapshot."""
        if self._dropped:
            raise UsageError("the restore failed")
        try:
            info = os.stat(self._snapshot)
        except OSError as error:
            raise UsageError(f"the snapshot is gone, no working set is written: {error}") from error
        if (info.st_size, info.st_mtime_ns) != (self._identity.size, self._identity.mtime_ns):
            raise UsageError(
                f"{os.fspath(self._snapshot)!r} is no longer the snapshot that was restored: no "
                "working set is written"
            )
