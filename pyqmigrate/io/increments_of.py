"""Find the increments of a base, so that the base is not replaced or changed under them.

The scan is bounded, and finds what is kept as recommended: increments in the directory of their base.
Increments in other directories, beyond the first :data:`ENTRIES_MAX` names of the directory, or after
:data:`SECONDS_MAX` are not found. Opening such an increment then reports that its base has changed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.format.increment import MAGIC, IncrementHeader, base_location
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.mapped_ram import PAGES_ALIGNMENT
from pyqmigrate.io.companion_file import identify_snapshot

__all__ = ["ENTRIES_MAX", "SECONDS_MAX", "increments_of", "refuse_base"]

ENTRIES_MAX = 10000  # names of the directory that are looked at
SECONDS_MAX = 1.0


def increments_of(base: Path) -> list[tuple[Path, IncrementHeader]]:
    """Return the increments beside ``base``, an absolute path, that refer to the file there now.

    Files that cannot be read are left out, as is an increment whose base was changed before.
    """
    try:
        fd = os.open(base, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return []
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return []
        identity = identify_snapshot(base, fd)
    except (OSError, PyqmigrateError):
        return []
    finally:
        os.close(fd)
    return [
        (path, header)
        for path, header in _increments_in(base.parent)
        if _refers_to(header, path, info, identity)
    ]


def refuse_base(place: Path, *, change: str = "replaced") -> None:
    """Raise UsageError if a file that is about to be ``change`` is the base of increments."""
    found = increments_of(place)
    if not found:
        return
    names = ", ".join(repr(path.name) for path, _ in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise UsageError(
        f"{str(place)!r} would be {change}, and is the base of {names}{more}, which contain only what "
        "changed since: use another name, or first convert these to mapped-ram and remove them"
    )


def _increments_in(directory: Path) -> Iterator[tuple[Path, IncrementHeader]]:
    deadline = time.monotonic() + SECONDS_MAX
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for number, entry in enumerate(entries):
            if number >= ENTRIES_MAX or time.monotonic() > deadline:
                return
            with contextlib.suppress(OSError, PyqmigrateError):
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(info.st_mode) and info.st_size >= PAGES_ALIGNMENT:
                    header = _read_header(entry.path)
                    if header is not None:
                        yield Path(entry.path), header


def _read_header(path: str) -> IncrementHeader | None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if os.pread(fd, len(MAGIC), 0) != MAGIC:
            return None
        return IncrementHeader.read(_Bytes(fd))
    finally:
        os.close(fd)


def _refers_to(
    header: IncrementHeader, path: Path, info: os.stat_result, identity: SnapshotId
) -> bool:
    try:
        named = base_location(header.base_path, str(path)).stat()
    except (OSError, ValueError):
        return False
    return os.path.samestat(named, info) and header.base.differs_from(identity) is None


class _Bytes:
    """An open file as the source of a header."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)
