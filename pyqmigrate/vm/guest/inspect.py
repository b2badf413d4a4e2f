"""Inspect a running QEMU: machine, memory, devices, disks, settings.

    async with await Monitor.connect("/run/guest.qmp") as monitor:
        with await inspect(monitor) as guest:
            print(guest.machine, [block.name for block in guest.blocks])

It sends queries only, and changes nothing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pyqmigrate.errors import QemuRefused
from pyqmigrate.io.memory import FileMemory
from pyqmigrate.vm.cancellation import acquired
from pyqmigrate.vm.guest.disks import Disk, read_disks
from pyqmigrate.vm.guest.files import name_images
from pyqmigrate.vm.guest.memory import Backend, GuestBlock, find_memory, fits
from pyqmigrate.vm.guest.process import Process, find_process
from pyqmigrate.vm.guest.ramblock import RamLine, parse_ramblock
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.qemu.peer import Peer

__all__ = ["GuestInfo", "GuestBlock", "inspect"]

# Page bits of targets with a single page size; ARM's depends on the machine.
_PAGE_BITS = {
    "i386": 12,
    "x86_64": 12,
    "ppc": 12,
    "ppc64": 12,
    "s390x": 12,
    "riscv32": 12,
    "riscv64": 12,
    "loongarch64": 12,
    "m68k": 12,
    "mips": 12,
    "mips64": 12,
    "sparc": 12,
    "sparc64": 13,
    "hppa": 12,
    "or1k": 13,
}
_NO_DEVICES = {"irq", "memory-region", "container"}
_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached")


@dataclass(frozen=True)
class GuestInfo:
    """A QEMU at the moment of its inspection.

    ``version`` is (major, minor, micro). ``process`` is its process, ``binary`` the path of its
    program; None and empty if unknown. ``machine`` is the full name, as in a stream
    (``pc-i440fx-10.0``), ``target`` the architecture (``x86_64``), ``target_page_bits`` None if
    only a stream records them. ``run_state`` is that of ``query-status``; ``running`` is also true
    in ``suspended``, where the guest sleeps and its devices keep working. ``migration_status`` is
    that of ``query-migrate``, "none" before the first. ``blocks`` are the blocks of a stream, in
    QEMU's order. ``devices`` are pairs of QOM path and type, ``dirty_bitmaps`` of node and bitmap,
    ``images`` of a file as QEMU names it and its use (with pflash and backing files), ``commands``
    the available QMP commands. ``processor_threads`` are the threads of the virtual CPUs, as numbered
    in QEMU's own pid namespace.

    It owns descriptors: close it, or use it as a context manager.
    """

    version: tuple[int, int, int]
    process: Process | None
    binary: str
    machine: str
    target: str
    target_page_bits: int | None
    run_state: str
    running: bool
    uuid: str
    blocks: tuple[GuestBlock, ...]
    capabilities: Mapping[str, bool]
    parameters: Mapping[str, Any]
    migration_status: str
    blocked_reasons: tuple[str, ...]
    disks: tuple[Disk, ...]
    devices: tuple[tuple[str, str], ...]
    dirty_bitmaps: tuple[tuple[str, str], ...]
    commands: frozenset[str]
    images: tuple[tuple[str, str], ...] = ()
    processor_threads: frozenset[int] = frozenset()

    @property
    def pid(self) -> int | None:
        """Its pid in this process's namespace; None if unknown."""
        return None if self.process is None else self.process.pid

    @property
    def total_ram(self) -> int:
        """Bytes in all blocks."""
        return sum(block.length for block in self.blocks)

    def close(self) -> None:
        """Close the descriptors of the process and of the blocks' memory. Call it once."""
        if self.process is not None:
            self.process.close()
        for block in self.blocks:
            if isinstance(block.memory, FileMemory):
                os.close(block.memory.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def inspect(monitor: Monitor) -> GuestInfo:
    """Query a QEMU, and find its memory.

    Unreadable memory is not an error: ``why_not`` of the block gives the reason. Raises QemuError
    if QEMU does not answer, or if its list of blocks is invalid.
    """
    target = str((await monitor.execute("query-target"))["arch"])
    status = await monitor.execute("query-status")
    migration = await monitor.execute("query-migrate")
    capabilities = await monitor.execute("query-migrate-capabilities")
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    devices = await monitor.execute("query-block")
    disks = read_disks(devices)
    facts: dict[str, Any] = {
        "version": monitor.version,
        "machine": await _machine(monitor),
        "target": target,
        "target_page_bits": _PAGE_BITS.get(target),
        "run_state": str(status["status"]),
        "running": bool(status["running"]) or status["status"] == "suspended",
        "uuid": str((await monitor.execute("query-uuid"))["UUID"]),
        "capabilities": {entry["capability"]: entry["state"] for entry in capabilities},
        "parameters": await monitor.execute("query-migrate-parameters"),
        "migration_status": str(migration.get("status", "none")),
        "blocked_reasons": tuple(migration.get("blocked-reasons", ())),
        "disks": disks,
        "images": name_images(disks, devices, nodes),
        "devices": tuple(await _devices(monitor)),
        "dirty_bitmaps": tuple(
            (str(node.get("node-name", "")), str(bitmap.get("name", "")))
            for node in nodes
            for bitmap in node.get("dirty-bitmaps", ())
        ),
        "commands": frozenset(
            str(entry["name"]) for entry in await monitor.execute("query-commands")
        ),
    }
    lines = parse_ramblock(await monitor.hmp("info ramblock"))
    backends = await _backends(monitor)
    processors = await monitor.execute("query-cpus-fast")
    threads = frozenset(int(processor["thread-id"]) for processor in processors)
    facts["processor_threads"] = threads
    guest = asyncio.to_thread(_with_memory, facts, lines, backends, monitor.peer, threads)
    return await acquired(guest, GuestInfo.close)


def _with_memory(
    facts: dict[str, Any],
    lines: list[RamLine],
    backends: Mapping[str, Backend],
    peer: Peer,
    threads: frozenset[int],
) -> GuestInfo:
    process, why_not = find_process(peer, threads, lambda space: fits(lines, backends, space))
    binary = "" if process is None else _binary(process.pid)
    pid = None if process is None or why_not else process.pid
    blocks = find_memory(lines, backends, pid, why_not)
    return GuestInfo(**facts, process=process, binary=binary, blocks=tuple(blocks))


def _binary(pid: int) -> str:
    try:
        return os.fspath(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return ""


async def _machine(monitor: Monitor) -> str:
    kind = await monitor.execute("qom-get", {"path": "/machine", "property": "type"})
    return str(kind).removesuffix("-machine")


async def _backends(monitor: Monitor) -> dict[str, Backend]:
    """Return the memory backends by id; those made by the command line have one, too."""
    types = {
        entry["name"]: _child_type(entry["type"])
        for entry in await monitor.execute("qom-list", {"path": "/objects"})
    }
    return {
        backend["id"]: Backend(
            types.get(backend["id"], ""), int(backend["size"]), bool(backend.get("share", False))
        )
        for backend in await monitor.execute("query-memdev")
        if "id" in backend
    }


async def _devices(monitor: Monitor) -> list[tuple[str, str]]:
    devices = []
    for container in _CONTAINERS:
        try:
            entries = await monitor.execute("qom-list", {"path": container})
        except QemuRefused:  # a machine without it
            continue
        devices += [
            (f"{container}/{entry['name']}", _child_type(entry["type"]))
            for entry in entries
            if entry["type"].startswith("child<") and _child_type(entry["type"]) not in _NO_DEVICES
        ]
    return devices


def _child_type(kind: str) -> str:
    return kind.removeprefix("child<").removesuffix(">")
