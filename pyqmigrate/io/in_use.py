"""Files that are still needed, and that nothing may be written over.

Work that writes files collects what must survive it, and each output is compared with that by
device and inode before anything is touched::

    in_use = files_in_use([
        (memory_fd, "the memory of block 'pc.ram'"),
        ("/images/guest.qcow2", "disk virtio0 of the guest"),
    ])
    refuse_in_use("/snap/guest.snap", in_use)                   # UsageError where it is one of them
    OutputFile.open("/snap/guest.snap", direct_io, in_use=in_use)      # looks itself
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

from pyqmigrate.errors import UsageError

__all__ = [
    "Area",
    "FileId",
    "InUse",
    "Named",
    "files_in_areas",
    "files_in_use",
    "files_mapped",
    "refuse_in_use",
]

Named: TypeAlias = str | os.PathLike[str] | int
"""A file by its path, or by a descriptor."""


class FileId(NamedTuple):
    """What tells one file from all others, whatever its names: device and inode.

    A block device is its device number, whichever node leads to it; its ``inode`` is 0.
    """

    device: int
    inode: int

    @classmethod
    def of(cls, info: os.stat_result) -> FileId:
        if stat.S_ISBLK(info.st_mode):
            return cls(info.st_rdev, 0)
        return cls(info.st_dev, info.st_ino)


InUse: TypeAlias = Mapping[FileId, str]
"""What each file is, as an error message says it: ``disk virtio0 of the guest``."""


def files_in_use(files: Iterable[tuple[Named, str]]) -> dict[FileId, str]:
    """The files behind paths (links are followed) and descriptors, each with what it is.

    With a loop device also the file that it is made of. What does not exist, or cannot be looked
    at, is left out. Where two entries are one file, the first counts.
    """
    found: dict[FileId, str] = {}
    for file, what in files:
        for identity in _identities(file):
            found.setdefault(identity, what)
    return found


class Area(NamedTuple):
    """``length`` bytes from an address on, and what they are."""

    address: int
    length: int
    what: str


def files_mapped(
    address: int, length: int, what: str, *, pid: int | None = None
) -> dict[FileId, str]:
    """The files that this process, or another, has mapped in ``length`` bytes from an address on,
    each with ``what`` it is. What cannot be found out is left out."""
    return files_in_areas(os.getpid() if pid is None else pid, [Area(address, length, what)])


def files_in_areas(pid: int, areas: Collection[Area]) -> dict[FileId, str]:
    """As :func:`files_mapped`, for several areas in one look at the mappings of a process."""
    found: dict[FileId, str] = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines():
            bounds, _, rest = line.partition(" ")
            start, end = (int(number, 16) for number in bounds.split("-"))
            for area in areas:
                if start < area.address + area.length and area.address < end:
                    found |= dict.fromkeys(_mapped_file(pid, rest), area.what)
    return found


def _mapped_file(pid: int, mapping: str) -> Iterator[FileId]:
    """The file of a line of ``maps``, behind its addresses."""
    _, _, device, inode, *path = mapping.split(maxsplit=4)
    if inode == "0":
        return
    major, minor = (int(number, 16) for number in device.split(":"))
    yield FileId(os.makedev(major, minor), int(inode))
    if path:  # some file systems (btrfs, overlayfs) show another device there than stat() does
        for identity in _identities(f"/proc/{pid}/root{path[0]}"):
            if identity.inode == int(inode):
                yield identity


def refuse_in_use(outputs: Iterable[Named] | Named, in_use: InUse) -> None:
    """UsageError where one of the files to be written, or replaced, is in use.

    Links are followed. An output that does not exist yet cannot be.
    """
    if not in_use:
        return
    for output in (outputs,) if isinstance(outputs, str | os.PathLike | int) else outputs:
        for identity in _identities(output):
            if identity in in_use:
                name = (
                    f"descriptor {output}" if isinstance(output, int) else repr(os.fspath(output))
                )
                raise UsageError(
                    f"{name} is {in_use[identity]}, which is in use and would be overwritten: "
                    "write to another file"
                )


def _identities(file: Named) -> Iterator[FileId]:
    with contextlib.suppress(OSError):
        info = os.stat(file)  # noqa: PTH116 - or a descriptor
        yield FileId.of(info)
        if stat.S_ISBLK(info.st_mode):
            device = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
            backing = Path(f"/sys/dev/block/{device}/loop/backing_file").read_text()
            yield FileId.of(Path(backing.removesuffix("\n")).stat())
