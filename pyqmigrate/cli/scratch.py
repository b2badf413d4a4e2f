"""Scratch directory and size for a synthetic guest."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pyqmigrate.cli.contents import SMALLEST
from pyqmigrate.cli.sizes import MIB, show_size
from pyqmigrate.errors import NoSpace, TargetError, UsageError
from pyqmigrate.io.free_space import free_bytes

__all__ = ["DEFAULT_DIRECTORY", "fitting_size", "scratch"]

# Not the usual directory for temporary files, which is often in memory: the disk is to be measured.
DEFAULT_DIRECTORY = os.environ.get("TMPDIR") or "/var/tmp"

_DISK_SPARE = 64 * MIB
_MEMORY_SPARE = 256 * MIB


@contextlib.contextmanager
def scratch(parent: str) -> Iterator[Path]:
    """Make a directory in ``parent``, and remove it with its contents at the end."""
    with tempfile.TemporaryDirectory(prefix="pyqmigrate-", dir=parent) as name:
        yield Path(name)


def fitting_size(asked: int | None, default: int, directory: Path, *, memories: int) -> int:
    """Return the size of a guest that fits: ``memories`` copies in memory, one file on the disk.

    That is ``asked``, or else ``default`` or less. Raises UsageError for an invalid size, NoSpace
    and TargetError where it does not fit.
    """
    if asked is not None and (asked < SMALLEST or asked % MIB):
        raise UsageError(
            f"the size must be a multiple of 1 MiB, {show_size(SMALLEST)} or more, not {asked} bytes"
        )
    free = free_bytes(directory)
    disk, memory = sys.maxsize if free is None else free, _free_memory()
    size = asked or default
    while True:
        fits_disk = disk is None or size + _DISK_SPARE <= disk
        fits_memory = memories * size + _MEMORY_SPARE <= memory
        if fits_disk and fits_memory:
            return size
        if asked is not None or size // 2 < SMALLEST:
            break
        size //= 2
    if disk is not None and not fits_disk:
        raise NoSpace(
            f"a guest of {show_size(size)} needs {show_size(size + _DISK_SPARE)} of disk, "
            f"{show_size(disk)} are free",
            directory,
        )
    raise TargetError(
        errno.ENOMEM,
        f"a guest of {show_size(size)} needs {show_size(memories * size + _MEMORY_SPARE)} "
        f"of memory, {show_size(memory)} are available",
    )


def _free_memory() -> int:
    """Return the available memory of the machine, or the limit of this control group if lower."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    with contextlib.suppress(OSError, ValueError):
        group = Path("/proc/self/cgroup").read_text().splitlines()[-1].rpartition(":")[2]
        limit = Path("/sys/fs/cgroup") / group.lstrip("/") / "memory.max"
        available = min(available, int(limit.read_text()))
    return available
