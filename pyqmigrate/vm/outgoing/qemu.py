"""Engine ``qemu``: QEMU writes the snapshot itself, through descriptors that it is lent.

The guest is stopped first, unless the save is ``live``: then it runs until what is left takes no
longer than ``downtime-limit``. QEMU notes down that a guest which we stopped is ``paused``, and
that is put right in the file before anybody sees it. (QEMU can be made to stop the guest itself,
but then writes all of its memory in a phase that it cannot be called back from.)
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from pyqmigrate.io.target import OutputFile
from pyqmigrate.vm.guest.run_state import set_run_state
from pyqmigrate.vm.outgoing.fdset import open_for_qemu
from pyqmigrate.vm.outgoing.migrate import AtInstant, ProgressCallback, Written, migrate
from pyqmigrate.vm.outgoing.transaction import SaveTransaction
from pyqmigrate.vm.plan.settings import Changes

__all__ = ["save_qemu"]

# A guest that writes faster than the disk never comes to an end by itself.
_PASSES = 10
_LONGEST_DOWNTIME = 2_000_000  # ms; the largest that QEMU takes


async def save_qemu(
    transaction: SaveTransaction,
    target: OutputFile,
    changes: Changes,
    *,
    run_state: str,
    running: bool,
    live: bool,
    resume: bool,
    while_paused: AtInstant | None = None,
    progress: ProgressCallback | None = None,
) -> Written:
    """Let QEMU write into ``target`` and, with ``resume``, let the guest go on. It was found in
    ``run_state``.

    Raises QemuError when the migration fails (QemuGone when QEMU dies, NoSpace), Cancelled,
    TargetError. ``custody`` makes the ``changes``, and puts back what is changed here, also then.
    """
    monitor = transaction.monitor
    notes: list[str] = []

    async def shorten(info: dict[str, Any]) -> None:
        if info.get("ram", {}).get("dirty-sync-count", 0) > _PASSES and not notes:
            notes.append(
                "the guest changed its memory as fast as it was written: it was stopped after "
                f"{_PASSES} passes"
            )
            await monitor.execute("migrate-set-parameters", {"downtime-limit": _LONGEST_DOWNTIME})

    with open_for_qemu(target) as fds:
        async with transaction.lent(fds) as path:
            await transaction.apply(changes)
            began = time.monotonic()
            if running and not live:
                await transaction.stop()
            info = await migrate(
                transaction,
                path,
                while_paused=while_paused,
                pause=running and live,
                progress=progress,
                watch=shorten if live else None,
            )
            if while_paused is not None:
                await transaction.check_that_it_stood()
            seen = now = time.monotonic()
            if resume:
                await transaction.resume()
                now = time.monotonic()
    downtime = None
    if running and resume:
        downtime = transaction.events.downtime(now - began)
        if downtime is None:
            downtime = now - seen + info["downtime"] / 1000 if live else now - began
    if running and not live and not await asyncio.to_thread(set_run_state, target, run_state):
        notes.append(f"the snapshot says that the guest was paused, though it was {run_state}")
    return Written(info["ram"]["transferred"], downtime, tuple(notes))
