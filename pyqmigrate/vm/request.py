"""What is asked of a restore."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass

from pyqmigrate.io.target import DirectIO
from pyqmigrate.vm.starting import Stream

__all__ = ["Mode", "Request"]


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
class Request:
    """What is asked of a restore; see :func:`pyqmigrate.vm.restore`."""

    mode: Mode = Mode.AUTO
    paused: bool | None = None
    qmp: str | os.PathLike[str] | None = None
    channels: int | None = None
    direct_io: DirectIO = DirectIO.AUTO
    stdin: Stream = None
    stdout: Stream = None
    stderr: Stream = None
    pass_fds: tuple[int, ...] = ()
    set_time: bool = False
    guest_agent: str | os.PathLike[str] | None = None
