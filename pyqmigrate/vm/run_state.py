"""What a guest will be when its snapshot is loaded."""

from __future__ import annotations

from pyqmigrate.format.devices import global_state
from pyqmigrate.io.target import Descriptors, OutputTarget
from pyqmigrate.snapshot import Snapshot

__all__ = ["set_run_state"]


def set_run_state(target: OutputTarget, run_state: str) -> bool:
    """Change the run state in an unpublished snapshot; whether it has one that could be changed.

    Raises SnapshotError for a file that is no snapshot, TargetError.
    """
    device = global_state(run_state)
    with target.opened_for_reading() as fd, Snapshot(Descriptors(fd)) as snapshot:
        for section in snapshot.stream.sections:
            if section.name == device.name and section.body_length == len(device.data):
                target.write_at(section.body_offset, device.data)
                return True
    return False
