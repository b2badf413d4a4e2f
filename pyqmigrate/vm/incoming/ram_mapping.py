"""The memory backends that make a new QEMU's RAM a private mapping of the snapshot.

A RAM block whose pages are mapped is at hand the moment QEMU starts: what the guest reads comes
from the file when it is touched, what it writes becomes the guest's own. That is the backend
``memory-backend-file`` on a descriptor that is inherited, with ``share=off,readonly=on,rom=off``
and the place of the pages as ``offset``. QEMU names a RAM block after its backend, so the backend
of a machine that was started with ``-m`` alone gets the name that the file has.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.snapshot.mapped_ram import MappedRamBlock, MappedRamSnapshot
from pyqmigrate.vm.qemu.command_line import (
    CommandLine,
    Option,
    is_on,
    join_properties,
    read_ram_size,
)

__all__ = ["Mapped", "block_of", "map_blocks", "memories_of", "memory_backends"]

_BACKEND = "memory-backend-"
# Devices whose memory is not what it seems: kept in a file of its own, or plugged piece by piece.
_OWN_MEMORY = ("nvdimm", "virtio-pmem", "virtio-mem", "ivshmem")
# What a backend may go on to say about its memory when that becomes a mapping of the snapshot.
_KEPT_SWITCHES = ("merge", "dump", "reserve")
# Patterns are strings, compiled when first used: a restore waits for each import.
_ID = r"[A-Za-z][A-Za-z0-9._-]*"  # QEMU's rule for names that a user gives
_MOST_NODES = 1 << 10  # of any Linux
_DROPPED = {
    "mem-path": "-mem-path is left out: memory is mapped from the snapshot",
    "mem-prealloc": "-mem-prealloc is left out: memory comes when it is touched",
}

# Machines that are known to write nothing into RAM while they wait for a migration.
_LEAVES_RAM_ALONE = r"$|(pc|isapc|microvm|virt|s390-ccw-virtio|xenfv)(-|$)"


@dataclass
class Mapped:
    """A command line whose QEMU maps these blocks, and what was changed besides."""

    command: CommandLine
    blocks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def map_blocks(command: CommandLine, snapshot: MappedRamSnapshot, fd: int) -> Mapped:
    """Have QEMU map every block that is its own, from descriptor ``fd`` of the QEMU to come.

    Raises NotSupported with the reason when that cannot be done, UsageError when the command
    line makes no sense.
    """
    _check(command, snapshot)
    mapped = Mapped(command)
    spared = memories_of(command)
    changes: dict[Option, Option] = {}
    for option, properties in memory_backends(command):
        name = properties.get("id", "")
        block = block_of(name, snapshot)
        if block is None or name in spared or is_on(properties.get("readonly")):
            continue
        nodes = _numbers(option.listed("host-nodes"))
        changes[option] = _backend(name, block, fd, properties, nodes)
        mapped.blocks.append(block.name)
        if is_on(properties.get("prealloc")):
            mapped.notes.append(f"prealloc=on of {name!r} is off: memory comes when it is touched")
        if is_on(properties.get("share")):
            mapped.notes.append(f"share=on of {name!r} is off: the guest's changes are its own")
    mapped.command = command.replaced(changes)
    if not _has_backend(command):
        block = _default_block(command, snapshot)
        mapped.command = mapped.command.with_options(
            _backend(block.name, block, fd, {}),
            Option("machine", join_properties(f"memory-backend={block.name}", {})),
        )
        mapped.blocks.append(block.name)
    if not mapped.blocks:
        raise NotSupported("no memory backend of the command line has the name of a RAM block")
    for name, note in _DROPPED.items():
        if command.has(name):
            mapped.command = mapped.command.without(name)
            mapped.notes.append(note)
    if any("virtio-balloon" in (option.value or "") for option in command.options):
        mapped.notes.append("the balloon cannot give mapped memory back to the host")
    if is_on(command.merged("overcommit").get("mem-lock")):
        mapped.notes.append("mem-lock=on reads all memory at once, and keeps it")
    drivers = {option.properties("driver").get("driver", "") for option in command.all("device")}
    backends = {option.properties("type").get("type") for option in command.all("netdev")}
    if any(d.startswith(("vfio", "vhost-vdpa")) for d in drivers) or "vhost-vdpa" in backends:
        mapped.notes.append("a device that is passed through pins all memory: it is read at once")
    return mapped


def _check(command: CommandLine, snapshot: MappedRamSnapshot) -> None:
    if not re.match(_LEAVES_RAM_ALONE, snapshot.machine):
        raise NotSupported(
            f"a QEMU that waits for a migration may write into the RAM of machine "
            f"{snapshot.machine!r} (a device tree, as pseries does)"
        )
    for option in command.options:
        if "vhost-user" in (option.value or ""):
            raise NotSupported(f"vhost-user works on shared memory only ({option})")
    for option in command.all("readconfig"):
        file = Path(option.value or "")
        try:
            if file.exists() and not file.is_file():  # to read a pipe is to take it from QEMU
                raise NotSupported(f"{option} is no file, and what it says is QEMU's alone")
            text = file.read_text(errors="replace")
        except OSError as error:
            raise NotSupported(f"{option} cannot be looked into: {error.strerror}") from error
        if "memory-backend" in text or "[memory]" in text:
            raise NotSupported(f"{option} describes memory; give it on the command line instead")
    for block in snapshot.blocks.values():
        if block.external:
            raise NotSupported(f"the content of block {block.name!r} is in another file")


def memories_of(command: CommandLine, drivers: tuple[str, ...] = _OWN_MEMORY) -> set[str]:
    """The ids of the backends that belong to a device whose driver starts so."""
    devices = (option.properties("driver") for option in command.all("device"))
    return {
        device["memdev"]
        for device in devices
        if "memdev" in device and device.get("driver", "").startswith(drivers)
    }


def memory_backends(command: CommandLine) -> Iterator[tuple[Option, dict[str, str]]]:
    """The options that make memory backends, with their properties."""
    for option in command.all("object"):
        properties = option.properties("qom-type")
        if properties.get("qom-type", "").startswith(_BACKEND):
            yield option, properties


def block_of(backend: str, snapshot: MappedRamSnapshot) -> MappedRamBlock | None:
    """The block whose memory the backend of that id makes."""
    # Machine types up to 4.0 name blocks of some backends by their whole path.
    return snapshot.blocks.get(backend) or snapshot.blocks.get(f"/objects/{backend}")


def _has_backend(command: CommandLine) -> bool:
    """Whether the machine's memory is made of backends that the command line names."""
    if "memory-backend" in command.merged("machine", "type"):
        return True
    return any("memdev" in option.properties("type") for option in command.all("numa"))


def _default_block(command: CommandLine, snapshot: MappedRamSnapshot) -> MappedRamBlock:
    """The block that a machine makes by itself for ``-m``: by its size, then by its name."""
    size = read_ram_size(command)
    found = [
        block
        for block in snapshot.blocks.values()
        if "/" not in block.name
        and size in (None, block.length)
        and (block.name == "ram" or block.name.endswith(".ram"))
    ]
    if len(found) != 1:
        asked = "" if size is None else f" of the {size} bytes that -m asks for"
        raise NotSupported(
            f"{'no' if not found else 'more than one'} RAM block{asked} is the machine's own: "
            f"the file has {[block.name for block in snapshot.blocks.values()]}"
        )
    if not re.fullmatch(_ID, found[0].name):
        raise NotSupported(f"a memory backend cannot have the name of block {found[0].name!r}")
    return found[0]


def _backend(
    name: str, block: MappedRamBlock, fd: int, given: dict[str, str], nodes: Sequence[int] = ()
) -> Option:
    if block.pages_offset % mmap.PAGESIZE:
        raise NotSupported(
            f"the pages of block {block.name!r} start at {block.pages_offset:#x}, "
            "where nothing can be mapped"
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
        "prealloc": False,
        "x-use-canonical-path-for-ramblock-id": block.name != name,
    }
    properties |= {key: is_on(given[key]) for key in _KEPT_SWITCHES if key in given}
    if "policy" in given:
        properties["policy"] = given["policy"]
    if nodes:
        properties["host-nodes"] = list(nodes)
    # As JSON, since a list is not written as key=value by everything that reads that form.
    return Option("object", json.dumps(properties))


def _numbers(texts: Iterable[str]) -> list[int]:
    """``0``, ``2-4`` and the like, as QEMU has it in lists of numbers."""
    numbers: list[int] = []
    for text in texts:
        first, _, last = text.partition("-")
        try:
            chosen = range(int(first), int(last or first) + 1)
        except ValueError as error:
            raise UsageError(f"host-nodes={text!r} is no number of a node") from error
        if not 0 <= chosen.start < chosen.stop <= _MOST_NODES:
            raise UsageError(f"host-nodes={text!r} are no nodes of a host")
        numbers += chosen
    return numbers
