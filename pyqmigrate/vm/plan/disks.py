"""Disk snapshots of a save: which overlays it would make, and what a restore needs of the disks.

A memory snapshot is consistent only with the disks as they were at its instant. A guest that goes
on writing runs ahead of it, and a restore against such a disk corrupts it. With an external
snapshot the guest goes on in a new file, an *overlay*, and its former file (the *base*) stays as
it was::

    plan = prepare(guest, Path("guest.snap"))    # changes nothing
    ...                                          # the guest is stopped
    await take(monitor, plan)                    # one transaction: all disks or none
    ...                                          # the memory is saved, the guest goes on

:mod:`pyqmigrate.vm.outgoing.disk_snapshots` takes them. The record of the save
(:mod:`pyqmigrate.vm.record.recording`) names both files. When the save fails,
:mod:`pyqmigrate.vm.outgoing.guardian` rolls them back.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath

from pyqmigrate.errors import NotSupported
from pyqmigrate.vm.guest.disks import Disk, DiskPlan, Overlay, seen_here
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.guest.overlay_names import overlay_name

__all__ = ["prepare", "restore_needs"]

_FORMATS = ("qcow2", "raw")


def restore_needs(disks: Sequence[Disk], *, resumed: bool, with_disks: bool = False) -> list[str]:
    """Return what a later restore needs of the writable disks, a sentence each.

    ``resumed``: the guest goes on after the save. ``with_disks``: disk snapshots are taken.
    """
    return [_need(disk, resumed, with_disks) for disk in disks if disk.writable]


def _need(disk: Disk, resumed: bool, with_disks: bool) -> str:
    what = f"disk {disk.name} ({disk.format}, {disk.file})"
    if with_disks:
        return f"{what}: give a restore a new overlay over it; the guest goes on in another file"
    if resumed:
        return (
            f"{what}: the guest goes on writing to it, so it runs ahead of the snapshot and a "
            "restore against it corrupts it; take the disks along (--with-disks), or end the guest "
            "(--then quit)"
        )
    return f"{what}: must be as it is now when the snapshot is restored"


def prepare(guest: GuestInfo, snapshot: Path) -> DiskPlan:
    """Choose an overlay for each writable disk: beside it, named after it and the snapshot
    (:func:`pyqmigrate.vm.guest.overlay_names.overlay_name`).

    Changes nothing. Raises NotSupported when a writable disk is not a qcow2 or raw image in a
    file that this process can reach, UsageError when the file of an overlay exists already.
    """
    token = secrets.token_hex(4)
    taken: set[Path] = set()
    overlays = []
    for number, disk in enumerate(disk for disk in guest.disks if disk.writable):
        overlay = _overlay(guest, disk, snapshot, f"snapshot-{token}-{number}", taken)
        taken.add(overlay.here)
        overlays.append(overlay)
    if overlays and "transaction" not in guest.commands:
        raise NotSupported(
            "this QEMU has no transactions, so it cannot snapshot all disks at one instant"
        )
    return DiskPlan(snapshot, tuple(overlays))


def _overlay(
    guest: GuestInfo, disk: Disk, snapshot: Path, node: str, taken: Collection[Path]
) -> Overlay:
    if disk.format not in _FORMATS:
        raise NotSupported(
            f"disk {disk.name} is {disk.format}; snapshots are taken of {' and '.join(_FORMATS)}"
        )
    base = seen_here(guest.pid, disk.file)
    try:
        regular = stat.S_ISREG(base.stat().st_mode)
    except OSError:
        regular = False
    if not regular or disk.file.startswith(("/proc/", "/dev/fd")):
        raise NotSupported(
            f"disk {disk.name} is {disk.file!r}, which is not a file that this process can "
            "reach: no overlay can be made beside it"
        )
    chain = [PurePath(file).name for file in (disk.file, *(image.file for image in disk.chain))]
    name = overlay_name(
        chain,
        snapshot.name,
        lambda name: base.with_name(name) in taken or os.path.lexists(base.with_name(name)),
    )
    file = os.path.join(os.path.dirname(disk.file), name)  # QEMU's own
    return Overlay(disk, file, node, base.with_name(name))
