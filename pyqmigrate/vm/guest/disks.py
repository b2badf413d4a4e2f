"""The disks of a running QEMU, and snapshots of them at the instant of a memory snapshot.

A memory snapshot is worth something only together with the disks as they were at its instant. A
guest that goes on writing runs ahead of it, and a restore against such a disk corrupts it. With
an external snapshot the guest goes on in a new file, an *overlay*, and the file that it had (the
*base*) stays as it was::

    plan = prepare(guest, Path("guest.snap"))    # nothing is touched yet
    ...                                          # the guest is stopped
    await take(monitor, plan)                    # one transaction: all disks or none
    ...                                          # the memory is saved, the guest goes on

The record of the save (:mod:`pyqmigrate.vm.record.recording`) has the names of both files. When the
save fails, :mod:`pyqmigrate.vm.outgoing.guardian` has the commands that undo it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pyqmigrate.errors import NotSupported, QemuRefused
from pyqmigrate.vm.guest.overlay_names import overlay_name

if TYPE_CHECKING:
    from pyqmigrate.vm.guest.inspect import GuestInfo
    from pyqmigrate.vm.qemu.monitor import Monitor

__all__ = [
    "ChainImage",
    "Disk",
    "DiskPlan",
    "Overlay",
    "prepare",
    "read_disks",
    "restore_needs",
    "seen_here",
    "stranded",
    "take",
]

_FORMATS = ("qcow2", "raw")


@dataclass(frozen=True)
class ChainImage:
    """An image below another one: its file and format as QEMU names them, and its size in bytes as
    a guest would see it."""

    file: str
    format: str
    size: int


@dataclass(frozen=True)
class Disk:
    """A disk with a medium. ``device`` is the name of ``-drive``, empty with ``-blockdev``.

    ``qdev`` is the QOM path or id of the device that has it, ``node`` its top node, ``file`` that
    node's file as QEMU names it (``json:...`` where a name cannot), ``format`` the driver
    (``qcow2``, ``raw``), ``size`` what the guest sees, in bytes. ``chain`` are its backing files,
    from the top down.
    """

    device: str
    qdev: str
    node: str
    file: str
    format: str
    writable: bool
    size: int = 0
    chain: tuple[ChainImage, ...] = ()

    @property
    def name(self) -> str:
        """What a person knows it by."""
        return self.device or self.qdev.removesuffix("/virtio-backend") or self.node


@dataclass(frozen=True)
class Overlay:
    """A disk that goes on in another file: ``file``, a qcow2 over ``disk.file``, as QEMU names it.

    ``node`` is the name of its node; ``here`` is the same file as this process sees it.
    """

    disk: Disk
    file: str
    node: str
    here: Path

    def journal_entry(self) -> dict[str, str]:
        """Return the entry for a guardian's journal (:mod:`pyqmigrate.vm.outgoing.guardian`)."""
        return {
            "name": self.disk.name,
            "node": self.node,
            "base": self.disk.node,
            "base_file": self.disk.file,
            "file": self.file,
            "local_file": os.path.abspath(self.here),  # noqa: PTH100 - not where its links lead
        }


@dataclass
class DiskPlan:
    """External snapshots to take, or taken, of all writable disks."""

    snapshot: Path
    overlays: tuple[Overlay, ...]
    taken: bool = False


def read_disks(devices: Sequence[dict[str, Any]]) -> tuple[Disk, ...]:
    """The disks in what ``query-block`` returns; drives without a medium are none."""
    return tuple(_disk(device, device["inserted"]) for device in devices if "inserted" in device)


def _disk(device: dict[str, Any], medium: dict[str, Any]) -> Disk:
    return Disk(
        device=device.get("device", ""),
        qdev=device.get("qdev", ""),
        node=medium.get("node-name", ""),
        file=medium.get("file", ""),
        format=medium.get("drv", ""),
        writable=not medium.get("ro", False),
        size=medium.get("image", {}).get("virtual-size", 0),
        chain=tuple(_chain(medium.get("image", {}))),
    )


def _chain(image: dict[str, Any]) -> Iterator[ChainImage]:
    while "backing-image" in image:
        image = image["backing-image"]
        yield ChainImage(
            image.get("filename", ""), image.get("format", ""), image.get("virtual-size", 0)
        )


def restore_needs(disks: Sequence[Disk], *, resumed: bool, with_disks: bool = False) -> list[str]:
    """What a later restore needs of the writable disks, a sentence each.

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

    Touches nothing. Raises NotSupported when a writable disk is not a qcow2 or raw image in a
    file that is seen from here, UsageError when a file that an overlay would be is there already.
    """
    token = secrets.token_hex(4)
    taken: set[Path] = set()
    overlays = []
    for number, disk in enumerate(disk for disk in guest.disks if disk.writable):
        overlay = _overlay(guest, disk, snapshot, f"snapshot-{token}-{number}", taken)
        taken.add(overlay.here)
        overlays.append(overlay)
    if overlays and "transaction" not in guest.commands:
        raise NotSupported("this QEMU has no transactions, so no snapshots of disks at one instant")
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
            f"disk {disk.name} is {disk.file!r}, which is not a file that is seen from here: there "
            "is no place beside it for an overlay"
        )
    chain = [PurePath(file).name for file in (disk.file, *(image.file for image in disk.chain))]
    name = overlay_name(
        chain,
        snapshot.name,
        lambda name: base.with_name(name) in taken or os.path.lexists(base.with_name(name)),
    )
    file = os.path.join(os.path.dirname(disk.file), name)  # noqa: PTH118, PTH120 - QEMU's own
    return Overlay(disk, file, node, base.with_name(name))


def seen_here(pid: int | None, file: str) -> Path:
    """The path by which this process reaches a file that QEMU names so."""
    if pid is None:
        return Path(file)
    if not file.startswith("/"):
        return Path(f"/proc/{pid}/cwd") / file
    inside = Path(f"/proc/{pid}/root{file}")
    return inside if os.path.lexists(inside) else Path(file)


async def take(monitor: Monitor, plan: DiskPlan) -> None:
    """Take the snapshots, all or none, in one transaction, while the guest is stopped.

    That may be in ``paused``, ``postmigrate`` or ``finish-migrate``. From here on the guest's
    writes go to the overlays. Raises QemuRefused when nothing was changed.
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
    plan.taken = True  # also when the answer is lost
    try:
        await monitor.execute("transaction", {"actions": actions})
    except QemuRefused:
        plan.taken = False
        _remove_overlays(plan)  # QEMU leaves those that it had made when another failed
        raise


def stranded(plan: DiskPlan) -> list[str]:
    """What QEMU left when it ended before the snapshots that it took were undone, in sentences."""
    return [
        f"disk {overlay.disk.name} went on in {overlay.file} over {overlay.disk.file} when QEMU "
        "ended: start it with that file"
        for overlay in plan.overlays
        if os.path.lexists(_outlasting(overlay))
    ]


def _outlasting(overlay: Overlay) -> Path:
    """The overlay where no process of QEMU's leads to it any more."""
    return Path(overlay.file) if overlay.file.startswith("/") else overlay.here


def _remove_overlays(plan: DiskPlan) -> None:
    for overlay in plan.overlays:
        with contextlib.suppress(OSError):
            overlay.here.unlink()
