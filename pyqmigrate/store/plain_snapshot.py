"""The snapshot that is added, as a mapped-ram file: itself, or what ``convert`` makes of it. Of an
increment there is only the outline of that file; its pages are read from the increment and its base.

It also has what is beside the file: its seal, if it fits, the record of its machine, and its working set.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.core import MemorySource
from pyqmigrate.enums import Format
from pyqmigrate.errors import PyqmigrateError, SnapshotError, TargetError, target_error
from pyqmigrate.export.convert import convert
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.working_set import WorkingSetLine
from pyqmigrate.integrity.manifest import Manifest
from pyqmigrate.io.companion_file import companion_path
from pyqmigrate.io.target import Descriptors, Target
from pyqmigrate.io.working_set_file import read_working_set, working_set_path
from pyqmigrate.log import logger
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.increment import IncrementSnapshot
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.store.increments import current_seal, has_outline, write_outline
from pyqmigrate.store.parents import Guest, Parent
from pyqmigrate.store.shown_file import ShownFile

__all__ = ["RECORD_SUFFIX", "PlainSnapshot", "open_plain", "unnamed_file"]

RECORD_SUFFIX = ".vm.json"
_RECORD_MAX = 16 << 20  # bytes


@dataclass(frozen=True)
class WatchedFile:
    """A file that is read, and must not change; ``info`` is what the system said of it before."""

    fd: int
    info: os.stat_result
    name: str

    @classmethod
    def of(cls, snapshot: Snapshot) -> WatchedFile:
        source = snapshot.source
        return cls(source.file_fd, os.fstat(source.file_fd), source.name)

    def check(self) -> None:
        """Raise TargetError (EBUSY) if it was changed."""
        now = os.fstat(self.fd)
        if (now.st_size, now.st_mtime_ns) != (self.info.st_size, self.info.st_mtime_ns):
            raise TargetError(errno.EBUSY, "was changed while it was being added", self.name)


@dataclass
class PlainSnapshot:
    """A mapped-ram file that is open. ``watched`` are the files that it is read from, and must not change;
    the first is what was added. ``mtime_ns`` is the time of change that is shown. ``source`` is what it
    was, as in the head of a stored snapshot. ``place`` is its path, None if that is not known or the file
    was converted; ``original`` is that of what was added.

    For an increment, ``pages`` are the blocks' memories, and ``unchanged`` has, for each piece of the file,
    whether it is the parent's.
    """

    file: MappedRamSnapshot
    watched: tuple[WatchedFile, ...]
    mtime_ns: int
    source: str
    place: Path | None
    original: Path | None
    snapshot: Snapshot
    pages: Mapping[str, MemorySource] | None = None
    unchanged: bytes | None = None

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        return _specs(self.file)

    def seal(self) -> Manifest | None:
        """Return the seal beside the file if it is current and of what is shown."""
        return None if self.place is None else current_seal(self.file, self.watched[0].info)

    def guest(self, manifest: Manifest | None) -> Guest:
        """Return what a parent must have in common with the file, whose seal is ``manifest``."""
        return Guest(
            self.file.stream.uuid,
            self.file.machine,
            self.blocks,
            os.fstat(self.file.source.fd).st_size,
            None if manifest is None else manifest.algorithm,
            b"" if manifest is None else bytes(manifest.digests),
            _base_of(self.snapshot),
        )

    def check_unchanged(self) -> None:
        """Raise TargetError (EBUSY) if a file was changed since it was opened."""
        for file in self.watched:
            file.check()

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
    target: Snapshot | Target,
    directory: Path | None,
    stack: contextlib.ExitStack,
    choose: Callable[[Guest], Parent | None],
) -> tuple[PlainSnapshot, Manifest | None, Parent | None]:
    """Open a snapshot of any kind as a mapped-ram file, which ``stack`` closes; return it with its seal
    and its parent.

    directory: where the unnamed file is made that a conversion needs, None for one of temporary files.
    choose: returns the parent of a guest.

    An open snapshot stays open. Raises the errors of ``open_snapshot``, ``convert`` and ``choose``.
    """
    if isinstance(target, Snapshot):
        snapshot = target
    else:
        snapshot = open_snapshot(target)
        stack.callback(snapshot.close)
    if isinstance(snapshot, IncrementSnapshot) and has_outline(snapshot):
        return _open_increment(snapshot, directory, stack, choose)
    kind = _kind(snapshot)
    watched = WatchedFile.of(snapshot)
    place = snapshot.source.place
    if isinstance(snapshot, MappedRamSnapshot) and ShownFile.fits(snapshot):
        snapshot.verify()
        plain = PlainSnapshot(
            snapshot, (watched,), watched.info.st_mtime_ns, kind, place, place, snapshot
        )
    else:
        fd = unnamed_file(directory, place)
        stack.callback(os.close, fd)
        convert(snapshot, Descriptors(fd), to=Format.MAPPED_RAM)
        file = _opened_again(fd, stack)
        plain = PlainSnapshot(
            file, (watched,), watched.info.st_mtime_ns, kind, None, place, snapshot
        )
        plain.check_unchanged()
    manifest = plain.seal()
    return plain, manifest, choose(plain.guest(manifest))


def _open_increment(
    snapshot: IncrementSnapshot,
    directory: Path | None,
    stack: contextlib.ExitStack,
    choose: Callable[[Guest], Parent | None],
) -> tuple[PlainSnapshot, None, Parent | None]:
    """Open an increment by its outline."""
    watched = (WatchedFile.of(snapshot), WatchedFile.of(snapshot.base))
    snapshot.verify()
    # Its size is not known yet, and without a seal of the whole file not compared.
    guest = Guest(
        snapshot.stream.uuid, snapshot.machine, _specs(snapshot), 0, base=_base_of(snapshot)
    )
    parent = choose(guest)
    place = snapshot.source.place
    fd = unnamed_file(directory, place)
    stack.callback(os.close, fd)
    unchanged = write_outline(snapshot, fd, parent)
    plain = PlainSnapshot(
        _opened_again(fd, stack),
        watched,
        watched[0].info.st_mtime_ns,
        "increment",
        None,
        place,
        snapshot,
        {name: block.memory().source for name, block in snapshot.blocks.items()},
        unchanged,
    )
    return plain, None, parent


def _opened_again(fd: int, stack: contextlib.ExitStack) -> MappedRamSnapshot:
    """Open the mapped-ram file that was written to ``fd``."""
    snapshot = open_snapshot(Descriptors(fd))
    stack.callback(snapshot.close)
    assert isinstance(snapshot, MappedRamSnapshot)
    return snapshot


def _kind(snapshot: Snapshot) -> str:
    if isinstance(snapshot, IncrementSnapshot):
        return "increment"
    if snapshot.libvirt is not None:
        return "libvirt"
    return "mapped-ram" if isinstance(snapshot, MappedRamSnapshot) else "sequential"


def _base_of(snapshot: Snapshot) -> SnapshotId | None:
    return snapshot.header.base if isinstance(snapshot, IncrementSnapshot) else None


def _specs(snapshot: Snapshot) -> tuple[BlockSpec, ...]:
    return tuple(
        BlockSpec(block.name, block.length, block.page_size) for block in snapshot.blocks.values()
    )


def unnamed_file(directory: Path | None, place: Path | None) -> int:
    """Open an unnamed file: in ``directory``, beside the snapshot at ``place``, or among temporary files.

    The caller closes the descriptor. Raises TargetError.
    """
    for parent in (directory, None if place is None else place.parent):
        if parent is not None:
            with contextlib.suppress(OSError):
                return os.open(parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        with tempfile.TemporaryFile(buffering=0) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise target_error(error, "cannot make a temporary file", tempfile.gettempdir()) from error
