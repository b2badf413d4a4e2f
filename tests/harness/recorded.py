"""A QEMU with a disk that is saved, and restored by its record."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.incoming.restore import restore
from pyqmigrate.vm.outgoing.save import save
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.record.contents import VmRecord, read_record
from tests.harness.bare import BareQemu

__all__ = [
    "MIB",
    "SIZE",
    "VM",
    "drive",
    "going_on",
    "image",
    "overlays",
    "restored",
    "saved",
    "written",
]

MIB = 1 << 20
SIZE = 8 * MIB
VM = ["-M", "pc", "-m", "32M", "-smp", "2", "-cpu", "qemu64"]


def image(path: Path) -> Path:
    path.write_bytes(b"\x11" * SIZE)
    return path


def drive(disk: Path, form: str = "raw") -> list[str]:
    return [
        "-drive",
        f"file={disk},format={form},if=none,id=d0",
        "-device",
        "virtio-blk-pci,drive=d0,id=v0",
    ]


def saved(qemu: BareQemu, snapshot: Path, **options: Any) -> VmRecord:
    """Save it; the record."""

    async def session() -> None:
        async with await qemu.connect():
            pass
        await save(qemu.socket, snapshot, **options)

    asyncio.run(session())
    record = read_record(snapshot)
    assert record is not None
    return record


@contextlib.asynccontextmanager
async def going_on(*arguments: Any, **options: Any) -> AsyncIterator[RestoredVm]:
    """A restored guest, ended on exit."""
    guest = await restore(*arguments, **options)
    try:
        yield guest
    finally:
        await guest.end()


def restored(snapshot: Path, command: list[str] | None = None, **options: Any) -> list[str]:
    """Restore it and end it; the notes."""

    async def session() -> list[str]:
        async with going_on(snapshot, command, **options) as guest:
            return list(guest.report.notes)

    return asyncio.run(session())


async def written(monitor: Monitor) -> str:
    """The first disk gets other bytes at its start, by the guest's device; its file."""
    disks = [disk for disk in await monitor.execute("query-block") if "inserted" in disk]
    answer = await monitor.hmp(f'qemu-io -d {disks[0]["qdev"]} "write -P 0x22 0 512"')
    assert answer == "", answer
    return str(disks[0]["inserted"]["file"])


def overlays(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.endswith(".qcow2"))
