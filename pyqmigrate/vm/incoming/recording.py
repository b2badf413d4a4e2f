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
import functools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.errors import UsageError
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.pagemap import add_bits
from pyqmigrate.io.threads import start_thread
from pyqmigrate.io.working_set_file import check_working_set_place, write_working_set
from pyqmigrate.vm.guest.changed_pages import RestoredBlock, RestoredRam
from pyqmigrate.vm.guest.touched_pages import record_working_set

__all__ = ["Recorder", "WorkingSetRecorder", "WorkingSetReport"]


@dataclass(frozen=True)
class WorkingSetReport:
    """A recorded working set: the file ``path``, its number of ``pages``, and for how many ``seconds``
    the guest was watched. ``complete`` is False if the guest ended, or touched more than the file can
    list. In a store ``path`` is a text: the store, and the name of the object in it."""

    path: Path | str
    pages: int
    seconds: float
    complete: bool


def _copy(bitmap: Bitmap) -> Bitmap:
    copy, new = Bitmap(bitmap.npages), Bitmap(bitmap.npages)
    add_bits(copy, bitmap, new)
    new.close()
    return copy


class Recorder:
    """A recording that goes on in a thread.

    ``result`` is the report, once the recording was started; it may be awaited any number of times,
    and to cancel it stops the recording. Needs a running event loop.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._dropped = False
        self._future: concurrent.futures.Future[WorkingSetReport] = concurrent.futures.Future()
        self.result: asyncio.Future[WorkingSetReport] = asyncio.wrap_future(self._future)
        self.result.add_done_callback(self._ended)

    def stop(self) -> None:
        """Stop watching; what was seen is written. Does not wait. Idempotent."""
        self._stop.set()

    def drop(self) -> None:
        """Stop watching; nothing is written unless that is happening already."""
        self._dropped = True
        self._stop.set()

    def _start(self, record: Callable[[], WorkingSetReport]) -> None:
        """Start the thread, in which ``record`` watches and writes. Raises TargetError."""
        start_thread(
            threading.Thread(
                target=self._run, args=(record,), name="pyqmigrate-record", daemon=True
            )
        )

    def _ended(self, result: asyncio.Future[WorkingSetReport]) -> None:
        self.stop()
        if not result.cancelled():
            result.exception()  # retrieved: the caller need not await it

    def _run(self, record: Callable[[], WorkingSetReport]) -> None:
        self._future.set_running_or_notify_cancel()
        try:
            self._future.set_result(record())
        except BaseException as error:
            self._future.set_exception(error)

    def _check_kept(self) -> None:
        """Raise UsageError if the recording was dropped."""
        if self._dropped:
            raise UsageError("the restore failed")


class WorkingSetRecorder(Recorder):
    """Records the working set of one guest of the snapshot ``identity`` at ``snapshot``.

    Raises UsageError or TargetError if the file cannot be written beside the snapshot.
    """

    def __init__(self, snapshot: Path, identity: SnapshotId, seconds: float) -> None:
        super().__init__()
        self._snapshot, self._identity, self._seconds = snapshot, identity, seconds
        self._place = check_working_set_place(snapshot)

    def start(
        self, pid: int, blocks: Sequence[RestoredBlock], known: Sequence[Bitmap] | None = None
    ) -> None:
        """Start to watch the blocks of the process ``pid``; raises GuestMemoryError, TargetError.

        ``known`` are pages of each block that are not recorded. They are copied.
        """
        ram = RestoredRam(pid, blocks)
        try:
            known = None if known is None else [_copy(bitmap) for bitmap in known]
            self._start(functools.partial(self._record, ram, known))
        except BaseException:
            ram.close()
            raise

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
        self._check_kept()
        try:
            info = os.stat(self._snapshot)
        except OSError as error:
            raise UsageError(f"the snapshot is gone, no working set is written: {error}") from error
        if (info.st_size, info.st_mtime_ns) != (self._identity.size, self._identity.mtime_ns):
            raise UsageError(
                f"{os.fspath(self._snapshot)!r} is no longer the snapshot that was restored: no "
                "working set is written"
            )
