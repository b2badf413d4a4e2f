"""Memory backends that make a new QEMU's RAM a private mapping of the snapshot.

A mapped RAM block is available as soon as QEMU starts: pages are read from the file when they are
touched, and written pages are private to the guest. The backend is ``memory-backend-file`` on an
inherited descriptor, with ``share=off,readonly=on,rom=off`` and the offset of the pages. QEMU names
a RAM block after its backend, so the backend of a machine that was started with ``-m`` alone gets
the block's name from the file.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.snapshot.base import Block, Snapshot
from pyqmigrate.snapshot.mapped_ram import MappedRamBlock, MappedRamSnapshot
from pyqmigrate.vm.qemu.command_line import (
    CommandLine,
    Option,
    is_on,
    join_properties,
    read_ram_size,
)
from pyqmigrate.vm.qemu.memory_options import memories_of, memory_backends

__all__ = ["Mapped", "block_of", "map_blocks"]

# Properties of a backend that are kept for a mapping of the snapshot.
_KEPT_SWITCHES = ("merge", "dump", "reserve")
# Patterns are strings, compiled when first used: a restore waits for each import.
_ID = r"[A-Za-z][A-Za-z0-9._-]*"  # QEMU's rule for ids
# The kernel maps what is cached of the 64 KiB, or 2 MiB, around a touched page: the guest's own.
_ALIGNMENT = 2 << 20
_NODES_MAX = 1 << 10  # of any Linux
_DROPPED = {
    "mem-path": "-mem-path is left out: memory is mapped from the snapshot",
    "mem-prealloc": "-mem-prealloc is left out: memory is read when it is touched",
}

# Machines that do not write into RAM while they wait for a migration.
_LEAVES_RAM_ALONE = r"$|(pc|isapc|microvm|virt|s390-ccw-virtio|xenfv)(-|$)"


class Mapped:
    """A command line whose QEMU maps ``blocks``, and notes on what else changed."""

    def __init__(self, command: CommandLine) -> None:
        self.command = command
        self.blocks: list[str] = []
        self.notes: list[str] = []


def map_blocks(command: CommandLine, snapshot: MappedRamSnapshot, fd: int) -> Mapped:
    """Return a command line that maps every block possible from the inherited descriptor ``fd``.

    Raises NotSupported with the reason if that is not possible, UsageError for an invalid command
    line.
    """
    _check(command, snapshot)
    mapped = Mapped(command)
    excluded = memories_of(command)
    changes: dict[Option, Option] = {}
    for option, properties in memory_backends(command):
        name = properties.get("id", "")
        block = _mapped_block(name, snapshot)
        if block is None or name in excluded or is_on(properties.get("readonly")):
            continue
        nodes = _numbers(option.listed("host-nodes"))
        changes[option] = _backend(name, block, fd, properties, nodes)
        mapped.blocks.append(block.name)
        if is_on(properties.get("prealloc")):
            mapped.notes.append(
                f"prealloc=on of {name!r} is off: memory is read when it is touched"
            )
        if is_on(properties.get("share")):
            mapped.notes.append(f"share=on of {name!r} is off: the guest's changes are private")
    mapped.command = command.replaced(changes)
    if not _has_backend(command):
        block = _default_block(command, snapshot)
        mapped.command = mapped.command.with_options(
            _backend(block.name, block, fd, {}),
            Option("machine", join_properties(f"memory-backend={block.name}", {})),
        )
        mapped.blocks.append(block.name)
    if not mapped.blocks:
        raise NotSupported(
            "no memory backend of the command line is named like a RAM block of the snapshot"
        )
    for name, note in _DROPPED.items():
        if command.has(name):
            mapped.command = mapped.command.without(name)
            mapped.notes.append(note)
    if any("virtio-balloon" in (option.value or "") for option in command.options):
        mapped.notes.append("the balloon cannot give mapped memory back to the host")
    if is_on(command.merged("overcommit").get("mem-lock")):
        mapped.notes.append("mem-lock=on reads and locks all memory at once")
    drivers = {option.properties("driver").get("driver", "") for option in command.all("device")}
    backends = {option.properties("type").get("type") for option in command.all("netdev")}
    if (
        any(driver.startswith(("vfio", "vhost-vdpa")) for driver in drivers)
        or "vhost-vdpa" in backends
    ):
        mapped.notes.append(
            "a passed-through device pins all memory, which is therefore read at once"
        )
    return mapped


def _check(command: CommandLine, snapshot: MappedRamSnapshot) -> None:
    if not re.match(_LEAVES_RAM_ALONE, snapshot.machine):
        raise NotSupported(
            f"a QEMU that waits for a migration may write into the RAM of machine "
            f"{snapshot.machine!r} (a device tree, as pseries does)"
        )
    for option in command.options:
        if "vhost-user" in (option.value or ""):
            raise NotSupported(f"vhost-user needs shared memory ({option})")
    for option in command.all("readconfig"):
        file = Path(option.value or "")
        try:
            if file.exists() and not file.is_file():  # reading a pipe would consume QEMU's input
                raise NotSupported(f"{option} is not a regular file, so it cannot be inspected")
            text = file.read_text(errors="replace")
        except OSError as error:
            raise NotSupported(f"cannot read {option}: {error.strerror}") from error
        if "memory-backend" in text or "[memory]" in text:
            raise NotSupported(f"{option} describes memory; give it on the command line instead")
    for block in snapshot.blocks.values():
        if block.external:
            raise NotSupported(f"the content of block {block.name!r} is not in the snapshot")


def block_of(backend: str, snapshot: Snapshot) -> Block | None:
    """Return the block of the backend with this id."""
    # Machine types up to 4.0 name the blocks of some backends by QOM path.
    return snapshot.blocks.get(backend) or snapshot.blocks.get(f"/objects/{backend}")


def _mapped_block(backend: str, snapshot: MappedRamSnapshot) -> MappedRamBlock | None:
    block = block_of(backend, snapshot)
    return None if block is None else snapshot.blocks[block.name]


def _has_backend(command: CommandLine) -> bool:
    """Return whether the command line names the backends of the machine's memory."""
    if "memory-backend" in command.merged("machine", "type"):
        return True
    return any("memdev" in option.properties("type") for option in command.all("numa"))


def _default_block(command: CommandLine, snapshot: MappedRamSnapshot) -> MappedRamBlock:
    """Return the block that the machine creates itself for ``-m``, by size and name."""
    size = read_ram_size(command)
    found = [
        block
        for block in snapshot.blocks.values()
        if "/" not in block.name
        and size in (None, block.length)
        and (block.name == "ram" or block.name.endswith(".ram"))
    ]
    if len(found) != 1:
        requested = "" if size is None else f" of {size} bytes (-m)"
        raise NotSupported(
            f"{'no' if not found else 'more than one'} RAM block{requested} could be the machine's "
            f"own: the file has {[block.name for block in snapshot.blocks.values()]}"
        )
    if not re.fullmatch(_ID, found[0].name):
        raise NotSupported(f"a memory backend cannot be named like block {found[0].name!r}")
    return found[0]


def _backend(
    name: str, block: MappedRamBlock, fd: int, given: dict[str, str], nodes: Sequence[int] = ()
) -> Option:
    if block.pages_offset % mmap.PAGESIZE:
        raise NotSupported(
            f"the pages of block {block.name!r} start at {block.pages_offset:#x}, which is not "
            "aligned for a mapping"
        )
    properties: dict[str, Any] = {
        "qom-type": "memory-backend-file",
        "id": name,
        "size": block.length,
        "mem-path": f"/proc/self/fd/{fd}",
        "offset": block.pages_offset,
        "share": False,
        "readonly": True,
        "rom": "off",
        "align": _ALIGNMENT,
        "prealloc": False,
        "x-use-canonical-path-for-ramblock-id": block.name != name,
    }
    properties |= {key: is_on(given[key]) for key in _KEPT_SWITCHES if key in given}
    if "policy" in given:
        properties["policy"] = given["policy"]
    if nodes:
        properties["host-nodes"] = list(nodes)
    # As JSON: not every parser of the key=value form supports lists.
    return Option("object", json.dumps(properties))


def _numbers(texts: Iterable[str]) -> list[int]:
    """Parse QEMU's lists of numbers: ``0``, ``2-4``."""
    numbers: list[int] = []
    for text in texts:
        first, _, last = text.partition("-")
        try:
            chosen = range(int(first), int(last or first) + 1)
        except ValueError as error:
            raise UsageError(f"host-nodes={text!r} is not a node number or range") from error
        if not 0 <= chosen.start < chosen.stop <= _NODES_MAX:
            raise UsageError(
                f"host-nodes={text!r} is out of range: nodes are 0 to {_NODES_MAX - 1}"
            )
        numbers += chosen
    return numbers
