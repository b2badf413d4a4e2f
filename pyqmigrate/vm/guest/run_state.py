"""The run state that a guest has when its snapshot is loaded."""

from __future__ import annotations

from pyqmigrate.format.device.sections import global_state
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot

__all__ = ["LOADABLE", "set_run_state", "what_stopped"]

LOADABLE = frozenset(
    {
        "running",
        "suspended",
        "prelaunch",
        "paused",
        "internal-error",
        "io-error",
        "shutdown",
        "watchdog",
        "guest-panicked",
    }
)
"""States that QEMU can load; it aborts at some others."""

_BY_ITSELF = {
    "internal-error": (
        "an error of QEMU or KVM stopped it",
        "it runs again only after system_reset",
    ),
    "io-error": ("an I/O error of a disk stopped it", "cont repeats the request that failed"),
    "shutdown": (
        "it has shut down, and QEMU stayed (-no-shutdown)",
        "it runs again only after system_reset",
    ),
    "watchdog": ("a watchdog stopped it", "cont lets it go on"),
    "guest-panicked": ("its kernel panicked", "cont lets it go on in the panic"),
}


def what_stopped(run_state: str) -> str | None:
    """Describe what stopped a guest that was not paused, and what a restore gives; None for other
    states."""
    if run_state not in _BY_ITSELF:
        return None
    why, how_to_go_on = _BY_ITSELF[run_state]
    return (
        f"the guest is in state {run_state}: {why}; a restore gives a guest in the same state, "
        f"which does not run by itself: {how_to_go_on}"
    )


def set_run_state(target: OutputFile, run_state: str) -> bool:
    """Change the run state in an unpublished snapshot; return False if it has none of that size.

    Raises SnapshotError for a file that is not a snapshot, TargetError.
    """
    device = global_state(run_state)
    with (
        target.opened_for_reading() as fd,
        MappedRamSnapshot(StreamFile.open(Descriptors(fd))) as snapshot,
    ):
        for section in snapshot.stream.sections:
            if section.name == device.name and section.body_length == len(device.data):
                target.write_at(section.body_offset, device.data)
                return True
    return False
