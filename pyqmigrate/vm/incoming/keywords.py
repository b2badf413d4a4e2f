"""The keyword arguments of :func:`pyqmigrate.vm.restore`, :func:`pyqmigrate.vm.clone` and
:class:`pyqmigrate.vm.Pool`."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TypedDict

from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.vm.incoming.options import Mode, Push
from pyqmigrate.vm.qemu.error_output import Stream

__all__ = ["VmCloneOptions", "VmPoolOptions", "VmRestoreOptions"]


class _CommonOptions(TypedDict, total=False):
    mode: Mode | str
    paused: bool | None
    offset: int | None
    pass_fds: Collection[int]
    with_disks: bool
    disks_dir: str | os.PathLike[str] | None
    disks_as_they_are: bool
    base: str | os.PathLike[str] | None
    cache: str | os.PathLike[str] | None
    working_set: str | os.PathLike[str] | None
    push: Push | str
    huge_pages: bool


class VmRestoreOptions(_CommonOptions, total=False):
    """The options of :func:`pyqmigrate.vm.restore`.

    mode: see :class:`~pyqmigrate.vm.Mode`.
    paused: True leaves the guest paused, False lets it run, None does as ``-S`` or else the
        snapshot says.
    offset: where in the file the stream starts, in bytes; None is its start, or the end of the
        header of an image saved by libvirt.
    pass_fds: descriptors that the command line names by number.
    with_disks: give the guest new overlays over the disks as they were at the snapshot's instant,
        in the directory ``disks_dir`` (None: beside the snapshot). They are removed if the restore
        fails; the report's notes name them.
    disks_dir: see ``with_disks``.
    disks_as_they_are: restore even if the disks have changed since the snapshot or are not the
        recorded ones. The guest's file systems are then at risk.
    base: the path of an increment's base; None is the path that the increment records.
    cache: the directory in which packs of a remote store are kept, None for the default one.
    qmp: the path of a monitor socket to add, or unix:PATH.
    channels: how many channels QEMU reads with in mode ``load``; None, the default, and
        ``direct_io="auto"`` choose by how much of the file is in the page cache.
    direct_io: ``auto``, ``on`` or ``off``.
    stdin, stdout, stderr: QEMU's, as for subprocess.Popen; None is this process's own. Standard
        error is passed on by a thread of this process once the guest is there; what QEMU writes
        after this process has ended is lost.
    set_time: set the guest's clock by its agent, once it runs. If that fails, or takes more than
        five seconds, a note says so.
    guest_agent: the path of the agent's socket; None finds it in the command line.
    record: for how many seconds to record which pages the guest touches, into SNAPSHOT.workingset,
        which later restores read ahead. In the modes ``instant`` and ``lazy``; in mode ``lazy``
        nothing is sent within this time but what the guest requests, and the file is written when
        the guest has all of its memory. None, the default, records nothing. The recording goes on
        after the restore has returned: await ``recording`` of the result. Closing the result ends it;
        the pages seen until then are written. :mod:`pyqmigrate.vm.sync` waits for it.
    working_set: in mode ``lazy``, the file with the pages to send first, in its order; with ``record``
        the file to write. None is SNAPSHOT.workingset.
    push: in mode ``lazy``, when pages are sent that the guest has not requested; see
        :class:`~pyqmigrate.vm.Push`.
    huge_pages: in mode ``lazy``, have the kernel make huge pages of the guest's private memory at the
        end, which arrives in pages of 4 KiB.
    """

    qmp: str | os.PathLike[str] | None
    channels: int | None
    direct_io: DirectIO | str
    stdin: Stream
    stdout: Stream
    stderr: Stream
    set_time: bool
    guest_agent: str | os.PathLike[str] | None
    record: float | None


class VmCloneOptions(_CommonOptions, total=False):
    """The options of :func:`pyqmigrate.vm.clone`.

    mode, paused, offset, with_disks, disks_as_they_are: as in :class:`VmRestoreOptions`.
    base, cache, working_set, push, huge_pages: likewise.
    directory: where the monitors are made; it is created (the current directory).
    at_once: how many guests start at the same time; None is the number of processors.
    pass_fds: descriptors for every guest; ``fd=1{n}`` has guest 2 use descriptor 12.
    disks_dir: where the overlays are made (None: ``directory``); their names begin with the number
        of the guest.
    """

    directory: str | os.PathLike[str]
    at_once: int | None


class VmPoolOptions(_CommonOptions, total=False):
    """The options of :class:`pyqmigrate.vm.Pool`.

    mode, offset, with_disks, disks_as_they_are: as in :class:`VmRestoreOptions`.
    base, cache, working_set, push, huge_pages: likewise.
    paused: whether a guest is paused when it is handed over; None does as ``-S`` or else the snapshot
        says. Until then every guest is paused.
    directory: where the monitors are made, and the overlays unless ``disks_dir`` is given; it is
        created (the current directory).
    at_once: how many guests start at the same time; None is the number of processors.
    limit: how many guests may be in use at the same time; None is any number.
    pass_fds: descriptors for every guest, open for reading only.
    stderr: QEMU's, as for subprocess.Popen; None is this process's own.
    disks_dir: where the overlays are made. They are removed when their guest ends.
    """

    directory: str | os.PathLike[str]
    at_once: int | None
    limit: int | None
    stderr: Stream
