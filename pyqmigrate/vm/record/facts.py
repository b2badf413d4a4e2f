"""What a QEMU says of the VM that a record describes, beyond what a save has to know anyway."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from pyqmigrate.errors import QemuRefused
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.qemu.process_command import ProcessCommand
from pyqmigrate.vm.record.contents import Backend, Block, Cpus, Device, MachineRecord, RecordedQemu

__all__ = ["backends", "blocks", "cpus", "devices", "machine", "qemu_process"]


def qemu_process(guest: GuestInfo, command: ProcessCommand) -> RecordedQemu:
    """The process of ``guest``, with the command line that it shows."""
    return RecordedQemu(
        ".".join(map(str, guest.version)),
        guest.binary,
        command.words,
        command.redacted,
        command.directory,
    )


async def machine(monitor: Monitor, guest: GuestInfo) -> MachineRecord:
    """The machine; what this QEMU cannot say is None."""
    memory = await _asked(monitor, "query-memory-size-summary") or {}
    kvm = await _asked(monitor, "query-kvm")
    return MachineRecord(
        guest.machine,
        guest.target,
        None if kvm is None else "kvm" if kvm["enabled"] else "tcg",
        guest.uuid,
        memory.get("base-memory"),
        memory.get("plugged-memory"),
    )


async def cpus(monitor: Monitor) -> Cpus:
    """The processors that are there, and those that there could be."""
    present = await monitor.execute("query-cpus-fast")
    possible = await _asked(monitor, "query-hotpluggable-cpus") or []
    kind = ""
    if present:
        kind = str(
            await _asked(monitor, "qom-get", {"path": present[0]["qom-path"], "property": "type"})
            or ""
        )
    levels: dict[str, set[int]] = defaultdict(set)
    for slot in possible:
        for name, number in slot["props"].items():
            levels[name.removesuffix("-id")].add(number)
    return Cpus(
        len(present),
        sum(slot["vcpus-count"] for slot in possible),
        kind,
        {name: len(numbers) for name, numbers in levels.items()},
    )


async def backends(monitor: Monitor) -> tuple[Backend, ...]:
    """The memory backends that have an id."""
    types = {
        entry["name"]: entry["type"].removeprefix("child<").removesuffix(">")
        for entry in await _asked(monitor, "qom-list", {"path": "/objects"}) or []
    }
    return tuple(
        Backend(
            each["id"], types.get(each["id"], ""), int(each["size"]), bool(each.get("share", False))
        )
        for each in await monitor.execute("query-memdev")
        if "id" in each
    )


def devices(guest: GuestInfo) -> tuple[Device, ...]:
    return tuple(Device(path, kind) for path, kind in guest.devices)


def blocks(guest: GuestInfo) -> tuple[Block, ...]:
    return tuple(Block(block.name, block.length) for block in guest.blocks)


async def _asked(monitor: Monitor, command: str, arguments: dict[str, Any] | None = None) -> Any:
    """The answer, None where this QEMU or this machine has none."""
    try:
        return await monitor.execute(command, arguments)
    except QemuRefused:
        return None
