"""What makes a lazy restore impossible, found before QEMU starts.

QEMU itself has the last word: it refuses the capability ``postcopy-ram`` with its reason.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.memory_options import memory_backends

__all__ = ["file_obstacle", "userfaultfd_obstacle", "why_not_lazy"]

_DEVICE = "/dev/userfaultfd"
_SETTING = "/proc/sys/vm/unprivileged_userfaultfd"
_CAP_SYS_PTRACE = 19
_MEMORY_TYPES = ("tmpfs", "ramfs", "hugetlbfs", "devtmpfs")
_PINNING = ("vfio", "vhost-vdpa")


def why_not_lazy(command: CommandLine, snapshot: Snapshot | None = None) -> str | None:
    """Return what makes a lazy restore with ``command``, of ``snapshot`` if given, impossible; None if
    nothing is known to."""
    for block in () if snapshot is None else snapshot.blocks.values():
        if block.external:
            return f"the content of block {block.name!r} is not in the snapshot"
    return _pinned(command) or userfaultfd_obstacle() or next(_files_on_disks(command), None)


def userfaultfd_obstacle() -> str | None:
    """Return why this user's QEMU gets no userfaultfd, by which it waits for pages; None if it does."""
    if os.access(_DEVICE, os.R_OK | os.W_OK):
        return None
    if not os.path.exists(_DEVICE) and not os.path.exists(_SETTING):
        return "this kernel has no userfaultfd"
    try:
        allowed = Path(_SETTING).read_text().strip() == "1"
    except OSError:
        allowed = False
    if allowed or _has_capability(_CAP_SYS_PTRACE):
        return None
    return (
        f"this user may not use userfaultfd: make {_DEVICE} accessible (setfacl -m u:USER:rw "
        f"{_DEVICE}), or set vm.unprivileged_userfaultfd to 1"
    )


def _has_capability(number: int) -> bool:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return False
    for line in text.splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _pinned(command: CommandLine) -> str | None:
    for option in command.all("device"):
        driver = option.properties("driver").get("driver", "")
        if driver.startswith(_PINNING):
            return f"{driver} pins all of the guest's memory ({option})"
    for option in command.all("netdev"):
        if option.properties("type").get("type") == "vhost-vdpa":
            return f"vhost-vdpa pins all of the guest's memory ({option})"
    return None


def _files_on_disks(command: CommandLine) -> Iterator[str]:
    """Generate why memory files of the command line cannot be filled lazily."""
    paths = [properties.get("mem-path") for _, properties in memory_backends(command)]
    paths += [option.value for option in command.all("mem-path")]
    for path in filter(None, paths):
        obstacle = file_obstacle(Path(command.directory or "", path))
        if obstacle is not None:
            yield obstacle


def file_obstacle(path: Path) -> str | None:
    """Return why the memory in a file cannot be filled lazily; None if it can, or if that is unknown."""
    found = _file_system(path)
    if found is None or found in _MEMORY_TYPES:
        return None
    return (
        f"the guest's memory is in the file {os.fspath(path)!r} on {found}: QEMU fills only memory "
        "files on tmpfs or hugetlbfs lazily"
    )


def _file_system(path: Path) -> str | None:
    """Return the type of the file system that a file is on, or will be; None if that is unknown."""
    try:
        device = os.stat(path).st_dev
    except OSError as error:
        if error.errno != errno.ENOENT or path == path.parent:
            return None
        return _file_system(path.parent)
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields, _, rest = line.partition(" - ")
        if fields.split()[2:3] == [wanted]:
            return rest.split()[0]
    return None
