"""Run a migration of QEMU's to its end, and report its progress."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pyqmigrate.errors import Cancelled, NoSpace, PyqmigrateError, QemuError
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.integrity.manifest import Manifest
from pyqmigrate.io.job import Progress
from pyqmigrate.qapi.status import Status
from pyqmigrate.vm.cancellation import check_cancelled
from pyqmigrate.vm.outgoing.options import ProgressCallback
from pyqmigrate.vm.outgoing.transaction import SaveTransaction

__all__ = ["ENDED", "WhilePaused", "Written", "finish_migration", "migrate"]

WhilePaused: TypeAlias = Callable[[], Awaitable[object]]
"""Called while the guest is stopped and QEMU still owns its disks."""
_Watch: TypeAlias = Callable[[dict[str, Any]], Awaitable[object]]

_FIRST_POLL, _LAST_POLL = 0.001, 0.02  # seconds between two queries, without an event
_STATE_POLL = 0.001  # seconds
_REPORT_EVERY = 0.1  # seconds
ENDED = {Status.COMPLETED, Status.FAILED, Status.CANCELLED}
_STOPPING = {"finish-migrate", "save-vm"}


@dataclass(frozen=True)
class Written:
    """What an engine did. ``downtime`` is in seconds, None if the guest did not run before or does
    not run again. ``manifest`` returns the seal of the file, given the time of its last
    modification (ns). ``confirm`` is called when the file is durable, before it gets its name; an
    exception undoes the save. ``write_page_table`` writes the digests of the pages to a path, for a
    snapshot of this identity, and releases them. ``rounds``, ``slowdown``, ``base`` and
    ``changed_pages`` are those of :class:`~pyqmigrate.vm.outgoing.report.VmSaveReport`."""

    bytes_written: int
    downtime: float | None
    notes: tuple[str, ...] = ()
    manifest: Callable[[int], Manifest] | None = None
    write_page_table: Callable[[Path, SnapshotId], None] | None = None
    rounds: int | None = None
    slowdown: float | None = None
    base: str | None = None
    changed_pages: int | None = None
    confirm: Callable[[], object] | None = None


async def migrate(
    transaction: SaveTransaction,
    path: str,
    *,
    while_paused: WhilePaused | None = None,
    pause: bool = False,
    progress: ProgressCallback | None = None,
    watch: _Watch | None = None,
) -> dict[str, Any]:
    """Have QEMU migrate to the file ``path``; return the last ``query-migrate``, of its completion.

    ``while_paused`` is called while the guest is stopped and QEMU still owns its disks: with
    ``pause`` (which needs the capability pause-before-switchover) at the switchover, otherwise, for
    a stopped guest, first. ``watch`` gets each reply to ``query-migrate``. Raises QemuError if the
    migration fails, NoSpace if that is for lack of space, Cancelled if another client cancelled it,
    QemuGone if QEMU ended.
    """
    if while_paused is not None and not pause:
        await while_paused()
    await transaction.migrate(path)
    started = time.monotonic()
    if while_paused is not None and pause:
        info = await _wait(transaction, started, progress, watch, until=Status.PRE_SWITCHOVER)
        if info["status"] == Status.PRE_SWITCHOVER:
            await while_paused()
            state = Status.PRE_SWITCHOVER.value
            await transaction.monitor.execute("migrate-continue", {"state": state})
    return await finish_migration(transaction, started, progress=progress, watch=watch)


async def finish_migration(
    transaction: SaveTransaction,
    started: float | None = None,
    *,
    progress: ProgressCallback | None = None,
    watch: _Watch | None = None,
) -> dict[str, Any]:
    """Wait for the end of a migration; return and raise as :func:`migrate` does.

    ``started``: when it began, of time.monotonic(); by default now.
    """
    started = time.monotonic() if started is None else started
    info = await _wait(transaction, started, progress, watch)
    transaction.migration_ended()
    if info["status"] == Status.CANCELLED:
        raise Cancelled("the migration was cancelled through another monitor")
    if info["status"] == Status.FAILED:
        raise _error(str(info.get("error-desc", "QEMU gave no reason")))
    # "completed" is reported shortly before the run state is final.
    while (await transaction.monitor.execute("query-status"))["status"] in _STOPPING:
        await asyncio.sleep(_STATE_POLL)
    if progress is not None:
        progress(_progress(info, time.monotonic() - started))
    return info


async def _wait(
    transaction: SaveTransaction,
    started: float,
    progress: ProgressCallback | None,
    watch: _Watch | None,
    *,
    until: Status | None = None,
) -> dict[str, Any]:
    reported = started
    pause = _FIRST_POLL
    while True:
        info: dict[str, Any] = await transaction.monitor.execute("query-migrate")
        check_cancelled()
        if info.get("status") in (until, *ENDED):
            return info
        now = time.monotonic()
        if progress is not None and now - reported >= _REPORT_EVERY and "ram" in info:
            progress(_progress(info, now - started))
            reported = now
        if watch is not None:
            await watch(info)
        if await transaction.events.migration(pause) == Status.DEVICE:
            # The guest is stopped. Its end comes soon, and an answer would only be in its way.
            await transaction.events.migration(_LAST_POLL)
        pause = min(pause * 1.5, _LAST_POLL)


def _error(reason: str) -> PyqmigrateError:
    if os.strerror(errno.ENOSPC) in reason:
        return NoSpace(f"QEMU failed to save ({reason})")
    return QemuError(f"QEMU failed to save: {reason}")


def _progress(info: dict[str, Any], seconds: float) -> Progress:
    ram = info["ram"]
    done = ram["total"] - ram["remaining"]
    return Progress(
        bytes_done=done,
        bytes_total=ram["total"],
        data_pages=ram["normal"],
        zero_pages=ram["duplicate"],
        bytes_moved=ram["transferred"],
        seconds=seconds,
        rate=done / seconds if seconds else 0.0,
    )
