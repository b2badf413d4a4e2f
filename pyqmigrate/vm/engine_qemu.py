"""Engine ``qemu``: QEMU writes the snapshot itself, through descriptors that it is lent.

A running guest is not stopped first: the snapshot would then say ``paused``. QEMU is made to stop
it as soon as it has measured its own rate, some 100 ms after the start, whatever is left to write;
with ``live`` when what is left takes no longer than ``downtime-limit``.
"""

from __future__ import annotations

import time
from typing import Any

from pyqmigrate.io.target import OutputTarget
from pyqmigrate.vm.custody import Custody
from pyqmigrate.vm.lend import opened_for_qemu
from pyqmigrate.vm.migrating import AtInstant, ProgressCallback, Written, migrate

__all__ = ["save_by_qemu"]

# A guest that writes faster than the disk never comes to an end by itself.
_PASSES = 10
_LONGEST_DOWNTIME = 2_000_000  # ms; the largest that QEMU takes


async def save_by_qemu(
    custody: Custody,
    target: OutputTarget,
    *,
    running: bool,
    live: bool,
    resume: bool,
    at_instant: AtInstant | None = None,
    progress: ProgressCallback | None = None,
) -> Written:
    """Let QEMU write into ``target`` and, with ``resume``, let the guest go on.

    Raises QemuError when the migration fails (QemuGone when QEMU dies, NoSpace), Cancelled,
    TargetError. ``custody`` puts back what is changed here, also then.
    """
    monitor = custody.monitor
    notes: list[str] = []

    async def shorten(info: dict[str, Any]) -> None:
        if info.get("ram", {}).get("dirty-sync-count", 0) > _PASSES and not notes:
            notes.append(
                "the guest changed its memory as fast as it was written: it was stopped after "
                f"{_PASSES} passes"
            )
            await monitor.execute("migrate-set-parameters", {"downtime-limit": _LONGEST_DOWNTIME})

    with opened_for_qemu(target) as fds:
        async with custody.lent(fds) as path:
            await custody.apply()
            info = await migrate(
                monitor, path, at_instant=at_instant, pause=running, progress=progress,
                watch=shorten if live else None,
            )
            seen = time.monotonic()
            downtime = None
            if resume:
                await monitor.execute("cont")
                if running:
                    downtime = info["downtime"] / 1000 + time.monotonic() - seen
    return Written(info["ram"]["transferred"], downtime, tuple(notes))
