"""Query the facts of a record that a save does not need otherwise."""

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
    """Return the process of ``guest`` with its ``command`` line."""
    return RecordedQemu(
        ".".join(map(str, guest.version)),
        guest.binary,
        command.words,
        command.redacted,
        command.directory,
    )


async def machine(monitor: Monitor, guest: GuestInfo) -> MachineRecord:
    """Return the machine; facts that this QEMU does not know are None."""
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
    """Return the present and the possible CPUs."""
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
    """Return the memory backends that have an id."""
    types = {
        entry["name"]: entry["type"].removeprefix("child<").removesuffix(">")
        for entry in await _asked(monitor, "qom-list", {"path": "/objects"}) or []
    }
    return tuple(
        Backend(
            backend["id"],
            types.get(backend["id"], ""),
            int(backend["size"]),
            bool(backend.get("share", False)),
        )
        for backend in await monitor.execute("query-memdev")
        if "id" in backend
    )


def devices(guest: GuestInfo) -> tuple[Device, ...]:
    return tuple(Device(path, kind) for path, kind in guest.devices)


def blocks(guest: GuestInfo) -> tuple[Block, ...]:
    return tuple(Block(block.name, block.length) for block in guest.blocks)


async def _asked(monitor: Monitor, command: str, arguments: dict[str, Any] | None = None) -> Any:
    """Return the answer; None if this QEMU or machine does not support the query."""
    try:
        return await monitor.execute(command, arguments)
    except QemuRefused:
        return None
