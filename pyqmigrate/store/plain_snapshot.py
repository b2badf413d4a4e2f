"""The snapshot that is added, as a mapped-ram file: itself, or what ``convert`` makes of it.

It also has what is beside the file: its seal, if it fits, the record of its machine, and its working set.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.enums import Format
from pyqmigrate.errors import (
    NotSupported,
    PyqmigrateError,
    SnapshotError,
    TargetError,
    target_error,
)
from pyqmigrate.export.convert import convert
from pyqmigrate.format.seal import SealHead, count_pieces
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.mapped_ram import BlockSpec
from pyqmigrate.format.working_set import WorkingSetLine
from pyqmigrate.integrity.manifest import Manifest, read_manifest
from pyqmigrate.io.companion_file import companion_path
from pyqmigrate.io.place import seal_path
from pyqmigrate.io.target import Descriptors, Target
from pyqmigrate.io.working_set_file import read_working_set, working_set_path
from pyqmigrate.log import logger
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.increment import IncrementSnapshot
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.store.shown_file import ShownFile

__all__ = ["RECORD_SUFFIX", "PlainSnapshot", "open_plain", "unnamed_file"]

RECORD_SUFFIX = ".vm.json"
_RECORD_MAX = 16 << 20  # bytes


@dataclass
class PlainSnapshot:
    """A mapped-ram file that is open. ``info`` is what the system said of it before it was read;
    ``mtime_ns`` is the time of change that is shown. ``source`` is what it was, as in the head of a stored
    snapshot. ``place`` is its path, None if that is not known or the file was converted; ``original`` is
    that of what was added."""

    file: MappedRamSnapshot
    info: os.stat_result
    mtime_ns: int
    source: str
    place: Path | None
    original: Path | None
    base: SnapshotId | None = None

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        return tuple(
            BlockSpec(block.name, block.length, block.page_size)
            for block in self.file.blocks.values()
        )

    def seal(self) -> Manifest | None:
        """Return the seal beside the file if it is current and of what is shown. One that is not is
        left alone; so is a damaged one."""
        if self.place is None:
            return None
        info = self.info

        def fits(head: SealHead) -> bool:
            current = (head.size, head.mtime_ns) == (info.st_size, info.st_mtime_ns)
            return current and head.clear_pages_zero

        try:
            return read_manifest(
                seal_path(self.place), count_pieces(info.st_size) * 16, wanted=fits
            )
        except (SnapshotError, NotSupported, TargetError) as error:
            logger.warning("the seal of %s is not used: %s", self.place, error)
            return None

    def record(self) -> bytes | None:
        """Return the content of the record ``.vm.json`` beside the snapshot, None without one.

        Raises SnapshotError for one of more than 16 MiB, TargetError.
        """
        if self.original is None:
            return None
        path = companion_path(self.original, RECORD_SUFFIX)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise target_error(error, "cannot open the record", path) from error
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            try:
                data = file.read(_RECORD_MAX + 1)
            except OSError as error:
                raise target_error(error, "cannot read the record", path) from error
        if len(data) > _RECORD_MAX:
            raise SnapshotError(f"the record {str(path)!r} has more than {_RECORD_MAX} bytes")
        return data

    def working_set(self, identity: SnapshotId) -> bytes | None:
        """Return the content of a ``.workingset`` file for the shown file ``identity``, if there is one
        beside the snapshot that fits."""
        if self.place is None:
            return None
        try:
            found = read_working_set(working_set_path(self.place))
        except PyqmigrateError as error:
            logger.warning("the working set of %s is not used: %s", self.place, error)
            return None
        if found is None or found.snapshot.differs_from(identity) is not None:
            return None
        line = WorkingSetLine.of(identity, found.blocks, len(found.working_set), found.seconds)
        return line.encode(found.working_set) + found.working_set.encode()


def open_plain(
    target: Snapshot | Target, directory: Path | None, stack: contextlib.ExitStack
) -> PlainSnapshot:
    """Open a snapshot of any kind as a mapped-ram file; ``stack`` closes it.

    directory: where the unnamed file is made that a conversion needs, None for one of temporary files.
    An open snapshot stays open. Raises the errors of ``open_snapshot`` and ``convert``.
    """
    if isinstance(target, Snapshot):
        snapshot = target
    else:
        snapshot = open_snapshot(target)
        stack.callback(snapshot.close)
    source, base = _kind(snapshot)
    info = os.fstat(snapshot.source.file_fd)
    place = snapshot.source.place
    if isinstance(snapshot, MappedRamSnapshot) and ShownFile.fits(snapshot):
        snapshot.verify()
        return PlainSnapshot(snapshot, info, info.st_mtime_ns, source, place, place, base)
    fd = unnamed_file(directory, place)
    stack.callback(os.close, fd)
    convert(snapshot, Descriptors(fd), to=Format.MAPPED_RAM)
    now = os.fstat(snapshot.source.file_fd)
    if (now.st_size, now.st_mtime_ns) != (info.st_size, info.st_mtime_ns):
        raise TargetError(errno.EBUSY, "was changed while it was being added", snapshot.source.name)
    converted = open_snapshot(Descriptors(fd))
    stack.callback(converted.close)
    assert isinstance(converted, MappedRamSnapshot)
    return PlainSnapshot(converted, os.fstat(fd), info.st_mtime_ns, source, None, place, base)


def _kind(snapshot: Snapshot) -> tuple[str, SnapshotId | None]:
    if isinstance(snapshot, IncrementSnapshot):
        return "increment", snapshot.header.base
    if snapshot.libvirt is not None:
        return "libvirt", None
    return ("mapped-ram" if isinstance(snapshot, MappedRamSnapshot) else "sequential"), None


def unnamed_file(directory: Path | None, place: Path | None) -> int:
    """Open an unnamed file: in ``directory``, beside the snapshot at ``place``, or among temporary files.

    The caller closes the descriptor. Raises TargetError.
    """
    tried = [directory, None if place is None else place.parent, Path(tempfile.gettempdir())]
    error: OSError | None = None
    for parent in tried:
        if parent is None:
            continue
        try:
            return os.open(parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as failure:
            error = failure
    assert error is not None
    raise target_error(error, "cannot make a temporary file", tempfile.gettempdir()) from error
