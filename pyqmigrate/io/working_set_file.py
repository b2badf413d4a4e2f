"""``SNAPSHOT.workingset``: the pages that a guest touched after a restore, for the next restore.

place = check_working_set_place("/snap/guest.mapped")      # before work begins
...
write_working_set(place, identity, blocks, working_set, seconds=10)
recorded = read_working_set(working_set_path("/snap/guest.mapped"))
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.errors import UsageError
from pyqmigrate.format.snapshot_companion import LINE_MAX
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.working_set import SUFFIX, WORKING_SET, WorkingSet, WorkingSetLine
from pyqmigrate.io.companion_file import (
    companion_path,
    open_companion,
    read_pieces,
    write_companion,
)
from pyqmigrate.io.own_files import FileKind, check_replaceable

__all__ = [
    "IN_STORE",
    "WORKING_SET_FILE",
    "RecordedWorkingSet",
    "check_working_set_place",
    "current",
    "decode_working_set",
    "encode_working_set",
    "read_current_working_set",
    "read_working_set",
    "working_set_path",
    "write_working_set",
]

IN_STORE = "#"  # instead of a path: where the store of the snapshot keeps it
WORKING_SET_FILE = FileKind(WORKING_SET.noun, WORKING_SET.is_ours)


@dataclass(frozen=True)
class RecordedWorkingSet:
    """What was touched of the snapshot that is ``snapshot`` within ``seconds`` of its restore."""

    snapshot: SnapshotId
    blocks: tuple[BlockSpec, ...]
    working_set: WorkingSet
    seconds: float


def working_set_path(snapshot: str | os.PathLike[str]) -> Path:
    """Return where the working set of a snapshot is."""
    return companion_path(snapshot, SUFFIX)


def check_working_set_place(snapshot: str | os.PathLike[str]) -> Path:
    """Return where the working set of a snapshot is to be written. Raises as
    :func:`~pyqmigrate.io.own_files.check_replaceable` where something else is there."""
    return check_replaceable(working_set_path(snapshot), WORKING_SET_FILE)


def write_working_set(
    place: Path,
    snapshot: SnapshotId,
    blocks: Sequence[BlockSpec],
    working_set: WorkingSet,
    *,
    seconds: float,
    sync_name: bool = True,
) -> None:
    """Write the runs; the file has its name when it is whole and durable.

    Raises UsageError for runs outside of the blocks, and otherwise as
    :func:`~pyqmigrate.io.own_files.write_whole` does.
    """
    line = WorkingSetLine.of(snapshot, blocks, len(working_set), seconds).encode(working_set)
    write_companion(place, WORKING_SET_FILE, line, [working_set.encode()], sync_name=sync_name)


def encode_working_set(
    snapshot: SnapshotId, blocks: Sequence[BlockSpec], working_set: WorkingSet, seconds: float
) -> bytes:
    """Return the content of such a file. Raises UsageError for runs outside of the blocks."""
    line = WorkingSetLine.of(snapshot, blocks, len(working_set), seconds).encode(working_set)
    return line + working_set.encode()


def decode_working_set(content: bytes) -> RecordedWorkingSet:
    """Return what such a file contains. Raises SnapshotError if it is not a whole one."""
    line = WorkingSetLine.decode(content[:LINE_MAX])
    working_set = line.decode_runs(content[line.line.length :])
    return RecordedWorkingSet(line.snapshot, line.blocks, working_set, line.seconds)


def read_current_working_set(path: Path | str, snapshot: SnapshotId) -> RecordedWorkingSet:
    """Return the working set stored in ``path``, of ``snapshot`` as it is now.

    Raises UsageError if it is missing or of another snapshot, SnapshotError, TargetError.
    """
    recorded = read_working_set(Path(path))
    if recorded is None:
        raise UsageError("it does not exist")
    return current(recorded, snapshot)


def current(recorded: RecordedWorkingSet, snapshot: SnapshotId) -> RecordedWorkingSet:
    """Return a working set. Raises UsageError if it is not of ``snapshot`` as it is now."""
    difference = recorded.snapshot.differs_from(snapshot)
    if difference is not None:
        raise UsageError(f"it is not of this snapshot: {difference}")
    return recorded


def read_working_set(path: Path) -> RecordedWorkingSet | None:
    """Return the working set stored in ``path``; None if it does not exist.

    The caller checks that it belongs to the snapshot as it is now (:meth:`SnapshotId.differs_from`).
    Raises SnapshotError for a file that is not a whole working set, TargetError.
    """
    with open_companion(path, WORKING_SET) as opened:
        if opened is None:
            return None
        fd, head = opened
        line = WorkingSetLine.decode(head)
        body = b"".join(read_pieces(fd, WORKING_SET, line.line.length, line.body_size))
        return RecordedWorkingSet(line.snapshot, line.blocks, line.decode_runs(body), line.seconds)
