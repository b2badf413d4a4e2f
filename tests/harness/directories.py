"""Directories for tests, and the descriptors that they leave open."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.harness.unpacked import lack

__all__ = ["descriptors", "directory_on_disk", "takes_direct_io"]


def takes_direct_io(directory: Path) -> bool:
    """Return whether an aligned direct write works there; opening alone proves little."""
    probe = directory / "probe"
    fd = -1
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        with mmap.mmap(-1, 65536) as unit:
            return os.pwrite(fd, unit, 65536) == 65536
    except OSError:
        return False
    finally:
        if fd >= 0:
            os.close(fd)
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def directory_on_disk() -> Iterator[Path]:
    """Give an empty directory that takes direct I/O, removed afterwards; skip where there is none."""
    for parent in (tempfile.gettempdir(), "/var/tmp", "."):
        with tempfile.TemporaryDirectory(prefix="pyqmigrate-", dir=parent) as name:
            if takes_direct_io(Path(name)):
                yield Path(name).resolve()
                return
    lack("no temporary directory takes direct I/O: set TMPDIR to one on a disk")


def descriptors() -> dict[str, str]:
    """Return the open descriptors of this process and what they are."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found[entry.name] = str(entry.readlink())
    return {fd: name for fd, name in found.items() if not name.endswith("/fd")}
