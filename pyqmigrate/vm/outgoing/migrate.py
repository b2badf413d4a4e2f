"""Waiting for a migration of QEMU's, with its progress."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from pyqmigrate.errors import Cancelled, NoSpace, PyqmigrateError, QemuError
from pyqmigrate.integrity.manifest import Manifest
from pyqmigrate.io.job import Progress
from pyqmigrate.qapi.status import Status
from pyqmigrate.vm.cancellation import check_cancelled
from pyqmigrate.vm.outgoing.transaction import SaveTransaction

__all__ = ["AtInstant", "ProgressCallback", "Written", "migrate"]

ProgressCallback: TypeAlias = Callable[[Progress], object]
AtInstant: TypeAlias = Callable[[], Awaitable[object]]
"""Called while the guest stands still and its disks are still QEMU's."""
_Watch: TypeAlias = Callable[[dict[str, Any]], Awaitable[object]]

_FIRST_WAIT, _LONGEST_WAIT = 0.001, 0.02  # seconds between two questions, without an event
_A_MOMENT = 0.001  # seconds
_REPORT_EVERY = 0.1  # seconds
_ENDED = {Status.COMPLETED, Status.FAILED, Status.CANCELLED}
_STOPPING = {"finish-migrate", "save-vm"}


@dataclass(frozen=True)
class Written:
    """What an engine did. ``bytes_written`` went to the file; ``downtime`` is in seconds, None
    where the guest did not run before or does not again. ``manifest`` makes a seal for the file as
    it was written, from the time of its last modification (ns)."""

    bytes_written: int
    downtime: float | None
    notes: tuple[str, ...] = ()
    manifest: Callable[[int], Manifest] | None = None


async def migrate(
    transaction: SaveTransaction,
    path: str,
    *,
    while_paused: AtInstant | None = None,
    pause: bool = False,
    progress: ProgressCallback | None = None,
    watch: _Watch | None = None,
) -> dict[str, Any]:
    """Let QEMU migrate to the file ``path``; the last ``query-migrate`` when it has completed.

    ``while_paused`` is called while the guest stands still and its disks are still QEMU's: with
    ``pause`` (for which the capability pause-before-switchover must be on) at the switchover,
    otherwise, for a guest that does not run, before anything else. ``watch`` is given what QEMU
    says, each time it is asked. Raises QemuError when the migration fails, NoSpace when for want
    of space, Cancelled when somebody cancelled it, QemuGone when QEMU ended.
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
    info = await _wait(transaction, started, progress, watch)
    transaction.migrated()
    if info["status"] == Status.CANCELLED:
        raise Cancelled("the migration was cancelled through another monitor")
    if info["status"] == Status.FAILED:
        raise _failed(str(info.get("error-desc", "it does not say why")))
    # "completed" comes a moment before the run state is what it will be.
    while (await transaction.monitor.execute("query-status"))["status"] in _STOPPING:
        await asyncio.sleep(_A_MOMENT)
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
    pause = _FIRST_WAIT
    while True:
        info: dict[str, Any] = await transaction.monitor.execute("query-migrate")
        check_cancelled()
        if info.get("status") in (until, *_ENDED):
            return info
        now = time.monotonic()
        if progress is not None and now - reported >= _REPORT_EVERY and "ram" in info:
            progress(_progress(info, now - started))
            reported = now
        if watch is not None:
            await watch(info)
        await transaction.events.migration(pause)
        pause = min(pause * 1.5, _LONGEST_WAIT)


def _failed(why: str) -> PyqmigrateError:
    if os.strerror(errno.ENOSPC) in why:
        return NoSpace(f"QEMU failed to save ({why})")
    return QemuError(f"QEMU failed to save: {why}")


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
