"""The directory that is measured in: whether it is a disk, quiet, and out of the page cache."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import time
from pathlib import Path

__all__ = ["Disk", "NotADisk", "filesystem_of"]

MEMORY_FILESYSTEMS = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
_QUIET = 0.020  # seconds that a small fsync takes at most on a disk that is quiet
_PATIENCE = 45.0  # seconds


class NotADisk(Exception):
    """The directory lies in memory: what is measured there says nothing about a disk."""


def filesystem_of(directory: Path) -> str:
    """The type of the file system that ``directory`` is on (``ext4``)."""
    device = directory.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    best = ("", "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        fields = left.split()
        place = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4])
        kind = right.split()[0]
        if fields[2] == wanted:
            return kind
        # btrfs and overlayfs report other device numbers in stat than here.
        if len(place) > len(best[0]) and directory.resolve().is_relative_to(place):
            best = (place, kind)
    return best[1]


class Disk:
    """A directory on a disk.

    ``restless`` counts how often it did not become quiet, which makes the samples after it
    doubtful. Raises NotADisk for a directory in memory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.filesystem = filesystem_of(directory)
        if self.filesystem in MEMORY_FILESYSTEMS:
            raise NotADisk(f"{directory} is on {self.filesystem}, not on a disk")
        self.restless = 0

    def clear(self, *paths: Path) -> None:
        """Removes files and waits until the disk is quiet.

        Freeing a large fragmented file goes on after its removal (with ``discard`` for many
        seconds) and would be charged to the next contender.
        """
        for path in paths:
            path.unlink(missing_ok=True)
        os.sync()
        probe = self.directory / "probe"
        with probe.open("wb", buffering=0) as file:
            quiet, deadline = 0, time.monotonic() + _PATIENCE
            while quiet < 3:
                start = time.monotonic()
                os.pwrite(file.fileno(), os.urandom(4096), 0)
                os.fsync(file.fileno())
                now = time.monotonic()
                quiet = quiet + 1 if now - start < _QUIET else 0
                if now > deadline:
                    self.restless += 1
                    break
                time.sleep(0.02)
        probe.unlink()

    def make_cold(self, path: Path) -> None:
        """Drops ``path`` from the page cache."""
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # only clean pages can be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    @staticmethod
    def cached_bytes(path: Path) -> int:
        """Bytes of ``path`` that are in the page cache now."""
        size = path.stat().st_size
        if size == 0:
            return 0
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        with (
            path.open("rb") as file,
            contextlib.closing(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)) as mapping,
        ):
            resident = bytearray(-(-size // mmap.PAGESIZE))
            first = ctypes.c_char.from_buffer(mapping)
            states = (ctypes.c_char * len(resident)).from_buffer(resident)
            failed = libc.mincore(ctypes.addressof(first), size, ctypes.addressof(states))
            number = ctypes.get_errno()
            del first, states
            if failed:
                raise OSError(number, os.strerror(number), str(path))
        return sum(state & 1 for state in resident) * mmap.PAGESIZE
