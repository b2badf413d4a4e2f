"""The options of a save: as callers give them, and as they are used once checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self, TypeAlias, TypedDict

from pyqmigrate.enums import parse_enum
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.io.channels import check_channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.job import Progress
from pyqmigrate.snapshot.save.writer import Sparse
from pyqmigrate.vm.plan.engine import Engine
from pyqmigrate.vm.plan.live_option import LiveMethod, LiveRequest, check_live

__all__ = [
    "ProgressCallback",
    "SaveOptions",
    "Then",
    "VmCheckOptions",
    "VmLiveOptions",
    "VmSaveOptions",
]

ProgressCallback: TypeAlias = Callable[[Progress], object]


class Then(StrEnum):
    """What to do with the guest after a save."""

    RESUME = "resume"
    PAUSE = "pause"
    QUIT = "quit"


class VmLiveOptions(TypedDict, total=False):
    """The options that make a save live.

    live: True lets the guest run while most of it is saved, by the method with the shortest expected
        pause; a :class:`~pyqmigrate.vm.LiveMethod` or its name by this method only. The default is
        False.
    max_pause: the longest pause, in seconds, of a live save. A save that is not expected to keep it
        fails before it stops the guest, or lets it go at once. None promises nothing.
    base: write only what changed since this snapshot, from which the guest was restored; ``auto``
        finds it. None writes a whole snapshot. The save is live, by method ``changed``.
    full: with ``base``, write a whole snapshot that shares the unchanged pages with the base on
        disk; needs a file system that can (XFS, btrfs).
    keep_digests: write digests of the pages into SNAPSHOT.pages, 16 bytes a page, for later saves
        with this snapshot as ``base``. The save is live, by method ``precopy``.
    """

    live: bool | LiveMethod | str
    max_pause: float | None
    base: str | os.PathLike[str] | None
    full: bool
    keep_digests: bool


class VmCheckOptions(VmLiveOptions, total=False):
    """The options of :meth:`pyqmigrate.vm.Vm.check`: those of the save it is about,
    besides :class:`VmLiveOptions`.

    engine: ``qemu``, ``direct``, or ``auto`` (the default): direct unless that would miss something.
    sparse: ``exact`` allocates no zero page, ``dense`` all of them, ``auto`` is fast.
    """

    engine: Engine | str
    sparse: Sparse | str


class VmSaveOptions(VmCheckOptions, total=False):
    """The options of :meth:`pyqmigrate.vm.Vm.save`, besides :class:`VmCheckOptions`.

    then: ``resume``, ``pause``, or ``quit``, which ends QEMU once the snapshot has its name and
        waits for that, for half a minute at most. None leaves the guest as it was found.
    channels: threads, or multifd channels, that move pages: 1 to 255 (2).
    direct_io: ``auto``, ``on`` or ``off``.
    with_disks: take snapshots of the writable disks at the same instant.
    seal: an :class:`~pyqmigrate.Algorithm`: write a seal beside the snapshot, once
        the snapshot has its name and the guest is in its final state. With engine qemu the file is
        read for it. If that fails, the snapshot stays.
    describe: if QEMU writes no description of its device state (``xen-save-devices-state``), have a
        second, stopped QEMU of the same machine make it (:mod:`pyqmigrate.vm.twin.twin`) once the
        guest goes on; a note says if that is not possible. The default is True.
    set_time: set the clock of a guest that goes on, by its agent. If that fails, or takes more than
        five seconds, a note says so.
    guest_agent: the path of the agent's socket; None finds it in QEMU's command line.
    progress: called with a :class:`~pyqmigrate.Progress` about ten times a second.
    """

    then: Then | str | None
    channels: int
    direct_io: DirectIO | str
    with_disks: bool
    seal: Algorithm | str | None
    describe: bool
    set_time: bool
    guest_agent: str | os.PathLike[str] | None
    progress: ProgressCallback | None


_ENUMS: dict[str, type[StrEnum]] = {
    "then": Then,
    "direct_io": DirectIO,
    "sparse": Sparse,
    "seal": Algorithm,
}
_NONE_ALLOWED = {"then", "seal"}


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """Checked :class:`VmSaveOptions`, with their defaults."""

    engine: str = "auto"
    live: LiveRequest | None = None  # the options of VmLiveOptions
    then: Then | None = None
    channels: int = 2
    direct_io: DirectIO = DirectIO.AUTO
    sparse: Sparse = Sparse.AUTO
    with_disks: bool = False
    seal: Algorithm | None = None
    describe: bool = True
    set_time: bool = False
    guest_agent: str | os.PathLike[str] | None = None
    progress: ProgressCallback | None = None

    @classmethod
    def check(cls, options: VmSaveOptions) -> Self:
        """Raise UsageError for a value that is not one of its option's."""
        values: dict[str, Any] = {**options}
        for name, kind in _ENUMS.items():
            if name in values and not (values[name] is None and name in _NONE_ALLOWED):
                values[name] = parse_enum(kind, values[name], name)
        values["live"] = check_live(
            engine=values.get("engine", "auto"),
            live=values.pop("live", False),
            max_pause=values.pop("max_pause", None),
            base=values.pop("base", None),
            full=values.pop("full", False),
            keep_digests=values.pop("keep_digests", False),
            with_disks=values.get("with_disks", False),
        )
        checked = cls(**values)
        check_channels(checked.channels)
        return checked
