"""A record of a save, as tests need one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyqmigrate.vm.record.contents import (
    Backend,
    Block,
    Cpus,
    Device,
    DiskRecord,
    Image,
    ImageState,
    MachineRecord,
    RecordedQemu,
    SaveFacts,
    VmRecord,
)

__all__ = ["disk", "record"]

MIB = 1 << 20
COMMAND = ("/usr/bin/qemu-system-x86_64", "-M", "pc", "-m", "64M", "-smp", "2")


def disk(**changes: Any) -> DiskRecord:
    """A raw disk of 8 MiB on /images/disk, in a drive of id ``d``."""
    state = ImageState(8 * MIB, 1_700_000_000_000_000_000, 64, 1234, None)
    values: dict[str, Any] = {
        "device": "d",
        "qdev": "/machine/peripheral/d0/virtio-backend",
        "node": "#block1",
        "writable": True,
        "images": (Image("/images/disk", "raw", 8 * MIB, state),),
        "continued_in": None,
        "goes_on": False,
    }
    return DiskRecord(**{**values, **changes})


def record(
    *,
    command: Sequence[str] | None = COMMAND,
    redacted: Sequence[int] = (),
    directory: str | None = "/",
    disks: Sequence[DiskRecord] | None = None,
    **changes: Any,
) -> VmRecord:
    """That of a small guest; ``changes`` replace whole parts."""
    values: dict[str, Any] = {
        "snapshot": "guest.mapped",
        "identity": "0123456789abcdef0123456789abcdef",
        "qemu": RecordedQemu(
            "10.0.2",
            "/usr/bin/qemu-system-x86_64",
            None if command is None else tuple(command),
            tuple(redacted),
            directory,
        ),
        "machine": MachineRecord(
            "pc-i440fx-10.0", "x86_64", "tcg", "00000000-0000-0000-0000-000000000000", 64 * MIB, 0
        ),
        "cpus": Cpus(2, 2, "qemu64-x86_64-cpu", {"socket": 2, "core": 1, "thread": 1}),
        "devices": (Device("/machine/peripheral/net0", "virtio-net-pci"),),
        "backends": (Backend("pc.ram", "memory-backend-ram", 64 * MIB, False),),
        "blocks": (Block("pc.ram", 64 * MIB),),
        "disks": tuple([disk()] if disks is None else disks),
        "save": SaveFacts(
            "direct", "devices-only", None, (), "running", False, 1_700_000_001_000_000_000
        ),
    }
    return VmRecord(**{**values, **changes})
