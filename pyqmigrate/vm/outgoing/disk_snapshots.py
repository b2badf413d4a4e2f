"""Take the disk snapshots of a save (:mod:`pyqmigrate.vm.plan.disks`)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pyqmigrate.errors import QemuRefused
from pyqmigrate.vm.guest.disks import DiskPlan, Overlay
from pyqmigrate.vm.qemu.monitor import Monitor

__all__ = ["stranded", "take"]


async def take(monitor: Monitor, plan: DiskPlan) -> None:
    """Take the snapshots, all or none, in one transaction, while the guest is stopped.

    The run state may be ``paused``, ``postmigrate`` or ``finish-migrate``. From then on the
    guest's writes go to the overlays. Raises QemuRefused when nothing was changed.
    """
    if not plan.overlays:
        return
    actions = [
        {
            "type": "blockdev-snapshot-sync",
            "data": {
                "node-name": overlay.disk.node,
                "snapshot-file": overlay.file,
                "snapshot-node-name": overlay.node,
                "format": "qcow2",
            },
        }
        for overlay in plan.overlays
    ]
    plan.taken = True  # even when the answer is lost
    try:
        await monitor.execute("transaction", {"actions": actions})
    except QemuRefused:
        plan.taken = False
        _remove_overlays(plan)  # QEMU leaves the ones it had made before another failed
        raise


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


def _remove_overlays(plan: DiskPlan) -> None:
    for overlay in plan.overlays:
        with contextlib.suppress(OSError):
            overlay.here.unlink()
