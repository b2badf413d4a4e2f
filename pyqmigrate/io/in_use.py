"""Files that are in use, and must not be overwritten.

Code that writes files collects the files that must survive, and each output is compared with them by
device and inode before anything changes::

    in_use = files_in_use([
        (memory_fd, "the memory of block 'pc.ram'"),
        ("/images/guest.qcow2", "disk virtio0 of the guest"),
    ])
    refuse_in_use("/snap/guest.snap", in_use)                      # UsageError if it is one of them
    OutputFile.open("/snap/guest.snap", direct_io, in_use=in_use)  # checks it, too
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

from pyqmigrate.errors import UsageError
from pyqmigrate.io.maps_file import read_maps

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
    """The identity of a file, whatever its names: device and inode.

    A block device is identified by its device number, whatever its node; its ``inode`` is 0.
    """

    device: int
    inode: int

    @classmethod
    def of(cls, info: os.stat_result) -> FileId:
        if stat.S_ISBLK(info.st_mode):
            return cls(info.st_rdev, 0)
        return cls(info.st_dev, info.st_ino)


InUse: TypeAlias = Mapping[FileId, str]
"""What each file is, in words for an error message: ``disk virtio0 of the guest``."""


def files_in_use(files: Iterable[tuple[Named, str]]) -> dict[FileId, str]:
    """Return the files behind paths (links are followed) and descriptors, each with what it is.

    A loop device includes its backing file. Files that do not exist, or cannot be checked, are left
    out. If two entries are the same file, the first counts.
    """
    found: dict[FileId, str] = {}
    for file, what in files:
        for identity in _identities(file):
            found.setdefault(identity, what)
    return found


class Area(NamedTuple):
    """``length`` bytes at an address, and what they are."""

    address: int
    length: int
    what: str


def files_mapped(
    address: int, length: int, what: str, *, pid: int | None = None
) -> dict[FileId, str]:
    """Return the files that this process, or another, has mapped in ``length`` bytes at an address,
    each with ``what`` it is. Files that cannot be determined are left out."""
    return files_in_areas(os.getpid() if pid is None else pid, [Area(address, length, what)])


def files_in_areas(pid: int, areas: Collection[Area]) -> dict[FileId, str]:
    """Return the mapped files of several areas, see :func:`files_mapped`; the mappings of the
    process are read once."""
    found: dict[FileId, str] = {}
    with contextlib.suppress(OSError):
        lines = read_maps(pid)
        for area in areas:
            first = bisect.bisect_right(lines, area.address, key=lambda line: _bounds(line)[1])
            for line in itertools.islice(lines, first, None):
                if _bounds(line)[0] >= area.address + area.length:
                    break
                found |= dict.fromkeys(_mapped_file(pid, line), area.what)
    return found


def _bounds(line: str) -> tuple[int, int]:
    """Return the address of a mapping and that of its end, which is exclusive."""
    start, _, end = line[: line.index(" ")].partition("-")
    return int(start, 16), int(end, 16)


def _mapped_file(pid: int, line: str) -> Iterator[FileId]:
    """Yield the file of a line of ``maps``."""
    _, _, _, device, inode, *path = line.split(maxsplit=5)
    if inode == "0":
        return
    major, minor = (int(number, 16) for number in device.split(":"))
    yield FileId(os.makedev(major, minor), int(inode))
    if path:  # some file systems (btrfs, overlayfs) show another device here than in stat()
        for identity in _identities(f"/proc/{pid}/root{path[0]}"):
            if identity.inode == int(inode):
                yield identity


def refuse_in_use(outputs: Iterable[Named] | Named, in_use: InUse) -> None:
    """Raise UsageError if a file that is to be written or replaced is in use. Links are followed."""
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
        info = os.stat(file)  # or a descriptor
        yield FileId.of(info)
        if stat.S_ISBLK(info.st_mode):
            device = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
            backing = Path(f"/sys/dev/block/{device}/loop/backing_file").read_text()
            yield FileId.of(Path(backing.removesuffix("\n")).stat())
