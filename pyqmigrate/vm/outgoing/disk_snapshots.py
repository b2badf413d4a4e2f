"""Take the disk snapshots of a save (:mod:`pyqmigrate.vm.plan.disks`).

The files of the overlays are created while the guest runs, which takes some 10 to 100 ms; in the pause they
are only opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Any

from pyqmigrate.errors import QemuError, QemuRefused
from pyqmigrate.vm.guest.disks import DiskPlan, Overlay, read_disks
from pyqmigrate.vm.outgoing.guardian import creation_of
from pyqmigrate.vm.qemu.monitor import Monitor

__all__ = ["create", "remove_unused", "stranded", "take"]

_CREATE = "blockdev-create"
_POLL = 0.001  # seconds
_TIMEOUT = 60.0  # seconds for the creation of one file


async def create(monitor: Monitor, plan: DiskPlan) -> None:
    """Have QEMU create the files of the overlays, empty. Its disks stay as they are.

    Raises QemuRefused with QEMU's reason when nothing is left; QemuError if it takes too long, and then
    the caller undoes what was done (:func:`pyqmigrate.vm.outgoing.guardian.undo_disks`).
    """
    plan.created = True
    try:
        await _create(monitor, plan)
    except QemuRefused:
        remove_unused(plan)
        raise


async def _create(monitor: Monitor, plan: DiskPlan) -> None:
    for overlay in plan.overlays:
        job, node = creation_of(overlay.node)
        await _run(monitor, job, {"driver": "file", "filename": overlay.file, "size": 0})
        await monitor.execute(
            "blockdev-add", {"driver": "file", "node-name": node, "filename": overlay.file}
        )
        options = {
            "driver": "qcow2",
            "file": node,
            "size": overlay.disk.size,
            "backing-file": overlay.disk.file,
            "backing-fmt": overlay.disk.format,
        }
        try:
            await _run(monitor, job, options)
        finally:
            # A job that still runs keeps it; the rollback waits for that.
            with contextlib.suppress(QemuError):
                await monitor.execute("blockdev-del", {"node-name": node})


async def _run(monitor: Monitor, job: str, options: dict[str, Any]) -> None:
    """Run one job that creates an image."""
    await monitor.execute(_CREATE, {"job-id": job, "options": options})
    deadline = time.monotonic() + _TIMEOUT
    while True:
        state = next(j for j in await monitor.execute("query-jobs") if j["id"] == job)
        if state["status"] == "concluded":
            break
        if time.monotonic() > deadline:
            raise QemuError(f"QEMU has not created an overlay within {_TIMEOUT:g} s")
        await asyncio.sleep(_POLL)
    await monitor.execute("job-dismiss", {"id": job})
    if "error" in state:
        raise QemuRefused(_CREATE, str(state["error"]))


async def take(monitor: Monitor, plan: DiskPlan) -> None:
    """Take the snapshots, all or none, in one transaction, while the guest is stopped.

    The overlays are created if they were not before. The run state may be ``paused``,
    ``postmigrate`` or ``finish-migrate``. From then on the guest's writes go to the overlays. Raises
    QemuRefused when nothing was changed, and QemuError if a disk was resized since the plan was made.
    """
    if not plan.overlays:
        return
    if not plan.created:
        await create(monitor, plan)
    await _check_sizes(monitor, plan)
    actions = [
        {
            "type": "blockdev-snapshot-sync",
            "data": {
                "node-name": overlay.disk.node,
                "snapshot-file": overlay.file,
                "snapshot-node-name": overlay.node,
                "format": "qcow2",
                "mode": "existing",
            },
        }
        for overlay in plan.overlays
    ]
    plan.taken = True  # even when the answer is lost
    try:
        await monitor.execute("transaction", {"actions": actions})
    except QemuRefused:
        plan.taken = False
        remove_unused(plan)
        raise


async def _check_sizes(monitor: Monitor, plan: DiskPlan) -> None:
    sizes = {disk.node: disk.size for disk in read_disks(await monitor.execute("query-block"))}
    for overlay in plan.overlays:
        disk = overlay.disk
        if sizes.get(disk.node, disk.size) != disk.size:
            raise QemuError(f"disk {disk.name} was resized during the save: save it again")


def stranded(plan: DiskPlan) -> list[str]:
    """Describe the overlays that remain because QEMU ended before they were rolled back."""
    return [
        f"disk {overlay.disk.name} went on in {overlay.file} over {overlay.disk.file} when QEMU "
        "ended: start it with that file"
        for overlay in plan.overlays
        if os.path.lexists(_outlasting(overlay))
    ]


def _outlasting(overlay: Overlay) -> Path:
    """Return the overlay's path now that QEMU's process no longer leads to it."""
    return Path(overlay.file) if overlay.file.startswith("/") else overlay.here


def remove_unused(plan: DiskPlan) -> None:
    """Remove the overlays of snapshots that were not taken."""
    if plan.taken or not plan.created:
        return
    for overlay in plan.overlays:
        with contextlib.suppress(OSError):
            overlay.here.unlink()
