"""The files that a running guest needs, which a save must not replace.

Files are compared by device and inode (:mod:`pyqmigrate.io.in_use`): QEMU may have another root or
working directory, and other names for them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyqmigrate.errors import UsageError
from pyqmigrate.format.libvirt import is_libvirt
from pyqmigrate.format.stream.wire import MAGIC
from pyqmigrate.io.in_use import FileId, Named, files_in_use, files_mapped
from pyqmigrate.io.memory import FileMemory
from pyqmigrate.vm.guest.disks import Disk, seen_here
from pyqmigrate.vm.guest.process import command_of, covering, open_mapped, read_mappings

if TYPE_CHECKING:
    from pyqmigrate.vm.guest.inspect import GuestInfo

__all__ = ["files_of", "name_images"]

_HEAD = 16  # bytes, enough to recognize a snapshot


def name_images(
    disks: Sequence[Disk], devices: Sequence[Mapping[str, Any]], nodes: Sequence[Mapping[str, Any]]
) -> tuple[tuple[str, str], ...]:
    """Return pairs: an image's file as QEMU names it, and a description of its use in the guest.

    ``devices`` is the answer of ``query-block``, ``nodes`` that of ``query-named-block-nodes``:
    all open nodes, with backing files and images such as pflash that are not a disk.
    """
    uses: dict[str, str] = {disk.file: f"disk {disk.name} of the guest" for disk in disks}
    media = [device["inserted"] for device in devices if "inserted" in device]
    for disk, medium in zip(disks, media, strict=True):
        image = medium.get("image", {})
        while image := image.get("backing-image"):
            uses.setdefault(str(image.get("filename", "")), f"a backing file of disk {disk.name}")
    for node in nodes:
        name = f"an image of the guest (block node {node.get('node-name', '')})"
        for key in ("file", "backing_file"):
            uses.setdefault(str(node.get(key, "")), name)
    return tuple((file, use) for file, use in uses.items() if file)


def files_of(guest: GuestInfo) -> dict[FileId, str]:
    """Return the files that a save must not replace, each with a description.

    These are the files of the guest's memory, its images with all backing files, the files that
    QEMU's command line names, and those that QEMU has open. Left out are files that cannot be
    inspected, and snapshots that the guest maps privately: they may be replaced, because the guest
    keeps the old file.
    """
    found: dict[FileId, str] = {}
    for files in (
        _memory(guest),
        files_in_use(_images(guest)),
        files_in_use(_arguments(guest)),
        files_in_use(_open_files(guest)),
    ):
        found = files | found
    for identity in _mapped_snapshots(guest):
        found.pop(identity, None)
    return found


def _memory(guest: GuestInfo) -> dict[FileId, str]:
    found: dict[FileId, str] = {}
    for block in guest.blocks:
        what = f"the memory of block {block.name!r} of the guest"
        if isinstance(block.memory, FileMemory):
            found |= files_in_use([(block.memory.fd, what)])
        if guest.pid is not None:
            found |= files_mapped(block.host_address, block.length, what, pid=guest.pid)
    return found


def _images(guest: GuestInfo) -> Iterator[tuple[Named, str]]:
    for name, what in guest.images:
        yield seen_here(guest.pid, name), what
        yield Path(name), what


def _arguments(guest: GuestInfo) -> Iterator[tuple[Named, str]]:
    """Yield firmware, kernel, initrd and all other files that QEMU's command line names, except the
    source of an incoming migration."""
    command = None if guest.pid is None else command_of(guest.pid)
    for option in () if command is None else command.options:
        if option.value is None or option.name == "incoming":
            continue
        values = {option.value, *option.value.split(",")}
        with contextlib.suppress(UsageError):
            values |= {*option.properties("").values()}
        for value in values:
            if value:
                what = f"a file that QEMU's command line names (-{option.name})"
                yield seen_here(guest.pid, value), what


def _open_files(guest: GuestInfo) -> Iterator[tuple[Named, str]]:
    if guest.pid is None:
        return
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{guest.pid}/fd").iterdir():
            yield entry, f"a file that the guest's QEMU (process {guest.pid}) has open"


def _mapped_snapshots(guest: GuestInfo) -> Iterator[FileId]:
    if guest.pid is None:
        return
    with contextlib.suppress(OSError):
        space = read_mappings(guest.pid)
        for block in guest.blocks:
            for mapping in covering(space, block.host_address, block.length):
                if not mapping.inode or mapping.shared:
                    continue
                with contextlib.suppress(OSError):
                    fd = open_mapped(guest.pid, mapping)
                    try:
                        head = os.pread(fd, _HEAD, 0)
                        if head.startswith(MAGIC) or is_libvirt(head):
                            yield FileId.of(os.fstat(fd))
                            yield FileId(mapping.device, mapping.inode)
                    finally:
                        os.close(fd)
