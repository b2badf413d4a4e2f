"""Engine ``qemu``: QEMU writes the snapshot itself, to descriptors that are passed to it.

The guest is stopped first. Because the save stopped the guest, QEMU records ``paused``; the record is
corrected before the file is published. (QEMU could stop the guest itself, but would then write all
memory in a phase that cannot be cancelled.)
"""

from __future__ import annotations

import asyncio
import time

from pyqmigrate.io.output import OutputFile
from pyqmigrate.vm.guest.run_state import set_run_state
from pyqmigrate.vm.outgoing.fdset import open_for_qemu
from pyqmigrate.vm.outgoing.migrate import WhilePaused, Written, migrate
from pyqmigrate.vm.outgoing.options import ProgressCallback
from pyqmigrate.vm.outgoing.timeline import Lane
from pyqmigrate.vm.outgoing.transaction import SaveTransaction
from pyqmigrate.vm.plan.settings import Changes

__all__ = ["save_qemu"]


async def save_qemu(
    transaction: SaveTransaction,
    target: OutputFile,
    changes: Changes,
    *,
    run_state: str,
    running: bool,
    resume: bool,
    while_paused: WhilePaused | None = None,
    progress: ProgressCallback | None = None,
) -> Written:
    """Have QEMU write into ``target`` and, with ``resume``, resume the guest, which was found in
    ``run_state``.

    Raises QemuError if the migration fails (QemuGone if QEMU ends, NoSpace), Cancelled,
    TargetError. ``transaction`` applies the ``changes`` and rolls everything back.
    """
    notes: list[str] = []

    with open_for_qemu(target) as fds:
        async with transaction.add_fds(fds) as path:
            await transaction.apply(changes)
            stopped_at = time.monotonic()
            if running:
                await transaction.stop()
            with transaction.timeline.phase(Lane.QEMU, "write pages and device state"):
                info = await migrate(
                    transaction, path, while_paused=while_paused, progress=progress
                )
            if while_paused is not None:
                await transaction.check_still_stopped()
            now = time.monotonic()
            if resume:
                await transaction.resume()
                now = time.monotonic()
    downtime = None
    if running and resume:
        downtime = transaction.events.downtime(now - stopped_at)
        if downtime is None:
            downtime = now - stopped_at
    if running and not await asyncio.to_thread(set_run_state, target, run_state):
        notes.append(f"the snapshot records that the guest was paused, but it was {run_state}")
    return Written(info["ram"]["transferred"], downtime, tuple(notes))
