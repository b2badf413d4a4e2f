"""The disks of a running QEMU, and the overlays in which they go on after a disk snapshot."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ChainImage", "Disk", "DiskPlan", "Overlay", "read_disks", "seen_here"]


@dataclass(frozen=True)
class ChainImage:
    """A backing image: its file and format as QEMU names them, and its virtual size in bytes."""

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
        """The name to show to people."""
        return self.device or self.qdev.removesuffix("/virtio-backend") or self.node


@dataclass(frozen=True)
class Overlay:
    """The file in which a disk goes on: ``file``, a qcow2 over ``disk.file``, as QEMU names it.

    ``node`` is the name of its node; ``here`` is the path by which this process reaches it.
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
            "local_file": os.path.abspath(self.here),  # not where its links lead
        }


@dataclass
class DiskPlan:
    """External snapshots to take, or taken, of all writable disks.

    ``created``: files of the overlays may exist; ``taken``: the disks go on in them.
    """

    snapshot: Path
    overlays: tuple[Overlay, ...]
    created: bool = False
    taken: bool = False


def read_disks(devices: Sequence[dict[str, Any]]) -> tuple[Disk, ...]:
    """Return the disks in the answer of ``query-block``; drives without a medium are left out."""
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


def seen_here(pid: int | None, file: str) -> Path:
    """Return the path by which this process reaches a file as QEMU names it."""
    if pid is None:
        return Path(file)
    if not file.startswith("/"):
        return Path(f"/proc/{pid}/cwd") / file
    inside = Path(f"/proc/{pid}/root{file}")
    return inside if os.path.lexists(inside) else Path(file)
