"""What is asked of a restore."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.io.target import DirectIO
from pyqmigrate.vm.qemu.spawn import Stream

__all__ = ["Disks", "Mode", "Request"]


class Mode(enum.StrEnum):
    """How guest memory gets into the new QEMU.

    ``auto``: instantly where that is possible. A QEMU that does not start for another reason than
    its memory is not started a second time.
    """

    AUTO = "auto"
    INSTANT = "instant"
    LOAD = "load"
    POSTCOPY = "postcopy"


@dataclass(frozen=True)
class Disks:
    """What becomes of the disks of a snapshot.

    ``new_overlays``: each writable one gets a new overlay over what it was, in ``directory`` (None:
    beside the snapshot). ``as_they_are``: disks that have gone ahead of the snapshot, or are
    others, are used for all that; without, they are refused.
    """

    new_overlays: bool = False
    directory: Path | None = None
    as_they_are: bool = False


@dataclass(frozen=True)
class Request:
    """What is asked of a restore; see :func:`pyqmigrate.vm.restore`."""

    mode: Mode = Mode.AUTO
    paused: bool | None = None
    qmp: Path | None = None
    channels: int | None = None
    direct_io: DirectIO = DirectIO.AUTO
    stdin: Stream = None
    stdout: Stream = None
    stderr: Stream = None
    pass_fds: tuple[int, ...] = ()
    disks: Disks = Disks()
    set_time: bool = False
    guest_agent: str | os.PathLike[str] | None = None
