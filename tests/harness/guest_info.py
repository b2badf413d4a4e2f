"""Guests as inspect() reports them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyqmigrate.io.memory import FileMemory
from pyqmigrate.io.process_memory import ProcessMemory
from pyqmigrate.vm.guest.inspect import GuestBlock, GuestInfo

__all__ = ["MIB", "file_block", "guest", "private_block"]

MIB = 1 << 20


def file_block(name: str = "ram", size: int = 4096, **changes: Any) -> GuestBlock:
    block = GuestBlock(
        name,
        size * MIB,
        4096,
        0x7F0000000000,
        FileMemory(-1, 0, size * MIB),
        shared=True,
        file_backed=True,
        backend="memory-backend-file",
    )
    return replace(block, **changes)


def private_block(name: str = "rom", size: int = 1) -> GuestBlock:
    memory = ProcessMemory(1, 0x7E0000000000, size * MIB)
    return GuestBlock(name, size * MIB, 4096, 0x7E0000000000, memory, False, False)


def guest(*blocks: GuestBlock, running: bool = True, **changes: Any) -> GuestInfo:
    facts: dict[str, Any] = {
        "version": (10, 0, 2),
        "process": None,
        "binary": "/usr/bin/qemu-system-x86_64",
        "machine": "pc-q35-10.0",
        "target": "x86_64",
        "target_page_bits": 12,
        "run_state": "running" if running else "paused",
        "running": running,
        "uuid": "",
        "blocks": blocks or (file_block(), private_block()),
        "capabilities": {"mapped-ram": False, "x-ignore-shared": False, "dirty-bitmaps": False},
        "parameters": {},
        "migration_status": "none",
        "blocked_reasons": (),
        "disks": (),
        "devices": (),
        "dirty_bitmaps": (),
        "commands": frozenset({"migrate", "xen-save-devices-state"}),
    }
    return GuestInfo(**(facts | changes))
