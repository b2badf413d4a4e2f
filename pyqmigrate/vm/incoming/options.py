"""The options of a restore, checked.

The keyword arguments of the public functions are in :mod:`pyqmigrate.vm.incoming.keywords`, which a
restore does not load before it starts QEMU.
"""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import UsageError
from pyqmigrate.io.direct_io import DirectIO

if TYPE_CHECKING:
    import socket

    from pyqmigrate.vm.incoming.keywords import VmRestoreOptions
    from pyqmigrate.vm.qemu.error_output import Stream
    from pyqmigrate.vm.qemu.spawn import Connections

__all__ = ["DiskOptions", "Mode", "Push", "RestoreOptions", "check_record"]

_RECORD_MAX = 1_000_000  # seconds


class Mode(enum.StrEnum):
    """How guest memory gets into the new QEMU.

    ``auto`` is instant if possible, else lazy if possible, else load. QEMU is started a second time
    only if its memory kept it from starting, or it refuses the lazy way.
    """

    AUTO = "auto"
    INSTANT = "instant"
    LAZY = "lazy"
    LOAD = "load"
    POSTCOPY = "postcopy"


class Push(enum.StrEnum):
    """When pages are sent in mode lazy that the guest has not asked for: while it asks for none,
    always, or never."""

    IDLE = "idle"
    ALWAYS = "always"
    NEVER = "never"


class DiskOptions(NamedTuple):
    """How a restore treats the disks of a snapshot.

    ``new_overlays``: each writable disk gets a new overlay in ``directory`` (None: beside the
    snapshot). ``as_they_are``: accept disks that have changed since the snapshot or are not the
    recorded ones.
    """

    new_overlays: bool = False
    directory: Path | None = None
    as_they_are: bool = False


def check_record(seconds: float) -> float:
    """Return how long to record. Raises UsageError unless it is more than 0 seconds."""
    from pyqmigrate.argument_types import check

    check("record", seconds, int, float)
    if not 0 < seconds <= _RECORD_MAX:
        raise UsageError(f"record must be more than 0 and at most {_RECORD_MAX} s, not {seconds}")
    return float(seconds)


class RestoreOptions(NamedTuple):
    """Checked :class:`~pyqmigrate.vm.VmRestoreOptions`, with their defaults.

    ``bound``: QEMU is killed when this process ends, even after the restore.
    """

    mode: Mode = Mode.AUTO
    paused: bool | None = None
    offset: int | None = None
    qmp: Path | None = None
    channels: int | None = None
    direct_io: DirectIO = DirectIO.AUTO
    stdin: Stream = None
    stdout: Stream = None
    stderr: Stream = None
    pass_fds: tuple[int, ...] = ()
    disks: DiskOptions = DiskOptions()
    set_time: bool = False
    guest_agent: str | os.PathLike[str] | None = None
    record: float | None = None
    base: str | os.PathLike[str] | None = None
    cache: Path | None = None
    bound: bool = False
    working_set: Path | None = None
    push: Push = Push.IDLE
    huge_pages: bool = False

    def connections(self, second: socket.socket | None = None) -> Connections:
        """Return what connects QEMU with others, with ``second``."""
        return {
            "qmp": self.qmp,
            "stdin": self.stdin,
            "stdout": self.stdout,
            "stderr": self.stderr,
            "second": second,
        }

    @property
    def reads_pages(self) -> bool:
        """Whether the restore itself reads or maps pages of the snapshot."""
        return self.mode is not Mode.LAZY

    @property
    def reads_ahead(self) -> bool:
        """Whether the working set of a snapshot of a store is read ahead as soon as that is open.

        What is pushed is not read, and would not be recorded.
        """
        return self.mode in (Mode.AUTO, Mode.INSTANT) and self.record is None

    @classmethod
    def check(cls, options: VmRestoreOptions) -> Self:
        """Raise UsageError for a value that is not one of its option's, or a closed descriptor."""
        from pyqmigrate.qapi.monitor_address import monitor_path
        from pyqmigrate.vm.incoming.inherited_fds import check_descriptors

        values: dict[str, Any] = {**options}
        if "mode" in values:
            values["mode"] = parse_enum(Mode, values["mode"], "mode")
        if values.get("qmp") is not None:
            values["qmp"] = monitor_path(values["qmp"])
        if "direct_io" in values:
            values["direct_io"] = parse_enum(DirectIO, values["direct_io"], "direct_io")
        if "pass_fds" in values:
            values["pass_fds"] = check_descriptors(values["pass_fds"])
        if values.get("record") is not None:
            values["record"] = check_record(values["record"])
        if values.get("base") is not None:
            values["base"] = os.fsdecode(values["base"])
        if "push" in values:
            values["push"] = parse_enum(Push, values["push"], "push")
        if values.get("working_set") is not None:
            values["working_set"] = Path(os.fsdecode(values["working_set"])).absolute()
        if values.get("cache") is not None:
            values["cache"] = Path(os.fsdecode(values["cache"])).absolute()
        directory = values.pop("disks_dir", None)
        values["disks"] = DiskOptions(
            values.pop("with_disks", False),
            None if directory is None else Path(directory),
            values.pop("disks_as_they_are", False),
        )
        return cls(**values)
