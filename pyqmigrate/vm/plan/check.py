"""Predict what a save of this guest would do now."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import GuestMemoryError, NotSupported, QemuError, UsageError
from pyqmigrate.snapshot.save.writer import Sparse
from pyqmigrate.vm.guest.disks import Disk
from pyqmigrate.vm.guest.inspect import GuestBlock, GuestInfo, inspect
from pyqmigrate.vm.guest.run_state import what_stopped
from pyqmigrate.vm.incoming.lazy_checks import userfaultfd_obstacle, why_not_lazy
from pyqmigrate.vm.plan.blockers import DeviceStateMethod
from pyqmigrate.vm.plan.disks import prepare, restore_needs
from pyqmigrate.vm.plan.engine import Engine, EngineChoice, choose_engine
from pyqmigrate.vm.plan.estimate import Basis, DiskRate, Estimate, estimate, measure_rate
from pyqmigrate.vm.plan.live import LiveChoice, automatic_precopy, choose_live, live_options
from pyqmigrate.vm.plan.live_option import LiveMethod, LiveOption, LiveRequest, check_live
from pyqmigrate.vm.plan.plan import Plan, make_plan
from pyqmigrate.vm.plan.settings import UsedSetting
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.qemu.process_command import read_command
from pyqmigrate.vm.twin.describing import why_not_described

__all__ = ["CheckReport", "check"]

# Capabilities that QEMU refuses with mapped-ram, or that break a save to a file (10.0.2, 11.1.3).
_CAPABILITIES = {
    "return-path": "makes a save to a file fail",
    "postcopy-ram": "excludes mapped-ram, and makes a save to a file fail",
    "xbzrle": "excludes mapped-ram and multifd",
    "x-colo": "turns a migration into something other than a save",
    "background-snapshot": "excludes multifd",
    "zero-copy-send": "is for sockets only",
    "postcopy-preempt": "excludes mapped-ram",
    "dirty-limit": "slows the guest down during a migration",
    "auto-converge": "slows the guest down during a live save",
}
# The first version that allows x-ignore-shared with mapped-ram.
_IGNORES_SHARED = (11, 0, 0)
_PARAMETERS = {
    "tls-creds": ("", "QEMU refuses mapped-ram with TLS"),
    "multifd-compression": ("none", "QEMU refuses mapped-ram with compression"),
    "mode": ("normal", "a mode other than normal does not save a running guest"),
}


@dataclass(frozen=True)
class CheckReport:
    """What a save would do. Sizes in bytes.

    ``choice`` and ``plan`` are None if the guest cannot be saved; ``blockers`` are the reasons.
    ``estimate`` is of the memory's data, ``need`` the most disk space that the file takes.
    ``live`` is the method that the save would try first, None if the guest would be stopped for
    all of it; ``methods`` is what is known of each method for this guest.
    ``settings`` are those of QEMU that the save would change temporarily, ``notes`` those of its
    report. ``disk`` is None without a ``directory``; the settings are then those for a disk with
    direct I/O. ``warnings`` are about current settings of QEMU that would harm a save that did not
    change them, and about unusual states of the guest. ``disk_needs`` are sentences on what a
    restore needs of the writable ``disks`` if the guest goes on after the save; ``disks_along`` is
    whether they can be snapshotted at the same instant (``with_disks``), None without writable
    disks, and ``why_no_disks`` is the reason if not. ``why_not_lazy`` is what keeps a restore with
    this guest's command line, on this host, from mode ``lazy``; empty if nothing is known to.
    """

    version: tuple[int, int, int]
    pid: int | None
    machine: str
    run_state: str
    total_ram: int
    blocks: tuple[GuestBlock, ...]
    choice: EngineChoice | None
    plan: Plan | None
    settings: Mapping[str, UsedSetting]
    live: LiveChoice | None
    methods: tuple[LiveOption, ...]
    notes: tuple[str, ...]
    blockers: tuple[str, ...]
    warnings: tuple[str, ...]
    estimate: Estimate
    need: int
    directory: Path | None
    disk: DiskRate | None
    disks: tuple[Disk, ...]
    disk_needs: tuple[str, ...]
    disks_along: bool | None
    why_no_disks: str
    why_not_lazy: str

    @property
    def fits(self) -> bool | None:
        """Whether the file fits in the directory; None if unknown."""
        return None if self.plan is None else self.plan.fits

    @property
    def seconds(self) -> float | None:
        """How long writing takes at the measured rate; None without one."""
        if self.plan is None or self.disk is None or not self.disk.rate:
            return None
        return self.plan.seconds(self.estimate.data, self.disk.rate)

    @property
    def possible(self) -> bool:
        """Whether a save would succeed, as far as is known."""
        return self.choice is not None and self.fits is not False


async def check(
    monitor: Monitor,
    directory: str | os.PathLike[str] | None = None,
    *,
    engine: str = "auto",
    live: bool | LiveMethod | str = False,
    max_pause: float | None = None,
    base: str | os.PathLike[str] | None = None,
    full: bool = False,
    keep_digests: bool = False,
    sparse: Sparse | str = Sparse.AUTO,
) -> CheckReport:
    """Predict what a save into ``directory`` would do; the other arguments are those of a save.

    Sends only queries to QEMU, and writes up to 64 MiB into the directory, in a temporary file
    without a name. Raises QemuError if QEMU does not answer, TargetError if the directory cannot
    be written to, UsageError for options that are invalid or do not go together.
    """
    policy = parse_enum(Sparse, sparse, "sparse")
    request = check_live(
        engine=engine,
        live=live,
        max_pause=max_pause,
        base=base,
        full=full,
        keep_digests=keep_digests,
    )
    with await inspect(monitor) as guest:
        choice: EngineChoice | None = None
        plan: Plan | None = None
        methods: list[LiveChoice] = []
        blockers: list[str] = []
        where = None if directory is None else Path(directory)
        rate = None if where is None else await asyncio.to_thread(measure_rate, where)
        guessed: Estimate | None = None
        try:
            if request is not None and (guest.running or request.needs_digests_or_base):
                methods = await asyncio.to_thread(choose_live, guest, request)
            choice = choose_engine(guest, engine=methods[0].engine if methods else engine)
            if request is None:  # a guest that goes on after the save
                automatic = await asyncio.to_thread(automatic_precopy, guest, choice)
                methods = [] if automatic is None else [automatic]
            plan = await asyncio.to_thread(_plan, guest, choice, policy, request, methods, rate)
            guessed = _counted(guest, plan)
        except (NotSupported, QemuError, GuestMemoryError) as error:
            choice = None
            blockers.append(str(error))
        if guessed is None:
            guessed = await asyncio.to_thread(estimate, guest)
        options = await asyncio.to_thread(live_options, guest, request or LiveRequest())
        why_no_disks = _why_no_disks(guest, where)
        writable = any(disk.writable for disk in guest.disks)
        return CheckReport(
            version=guest.version,
            pid=guest.pid,
            machine=guest.machine,
            run_state=guest.run_state,
            total_ram=guest.total_ram,
            blocks=guest.blocks,
            choice=choice,
            plan=plan,
            settings={} if plan is None else plan.changes.used(),
            notes=() if plan is None else (*plan.notes, *_undescribed(guest, choice)),
            live=methods[0] if methods else None,
            methods=options,
            blockers=tuple(blockers),
            warnings=tuple(_warnings(guest, choice, rate)),
            estimate=guessed,
            need=guessed.data if plan is None else plan.need_of(guessed.data),
            directory=where,
            disk=rate,
            disks=guest.disks,
            disk_needs=tuple(restore_needs(guest.disks, resumed=guest.running)),
            disks_along=not why_no_disks if writable else None,
            why_no_disks=why_no_disks if writable else "",
            why_not_lazy=await asyncio.to_thread(_why_not_lazy, guest),
        )


def _plan(
    guest: GuestInfo,
    choice: EngineChoice,
    sparse: Sparse,
    request: LiveRequest | None,
    methods: list[LiveChoice],
    disk: DiskRate | None,
) -> Plan:
    return make_plan(
        guest,
        choice,
        channels=2,
        direct=disk is None or disk.direct_io,
        sparse=sparse,
        live=methods[0].method if methods else None,
        max_pause=None if request is None else request.max_pause,
        with_disks=False,
        free=None if disk is None else disk.free,
    )


def _counted(guest: GuestInfo, plan: Plan) -> Estimate | None:
    """Return the estimate that the plan is based on, if pages were counted for it."""
    if plan.data is None:
        return None
    unseen = any(block.memory is None for block in guest.blocks)
    return Estimate(plan.data, Basis.BOUND if unseen else Basis.COUNTED)


def _why_no_disks(guest: GuestInfo, directory: Path | None) -> str:
    """Return why the disks cannot be snapshotted, or an empty text."""
    try:
        prepare(guest, (directory or Path()) / "snapshot")
    except (NotSupported, UsageError) as error:
        return str(error)
    return ""


def _why_not_lazy(guest: GuestInfo) -> str:
    """Return what keeps a restore with the guest's own command line from mode lazy."""
    command = read_command(guest.pid)
    if command.words is None:
        return userfaultfd_obstacle() or ""
    try:
        parsed = CommandLine.parse(command.words)
    except UsageError:
        return userfaultfd_obstacle() or ""
    return why_not_lazy(parsed._replace(directory=command.directory)) or ""


def _undescribed(guest: GuestInfo, choice: EngineChoice | None) -> Iterator[str]:
    if (
        choice is not None
        and choice.way is DeviceStateMethod.DEVICES_ONLY
        and (why := why_not_described(guest))
    ):
        yield f"device state would be saved without its description: {why}"


def _warnings(
    guest: GuestInfo, choice: EngineChoice | None, disk: DiskRate | None
) -> Iterator[str]:
    if (stopped := what_stopped(guest.run_state)) is not None:
        yield stopped
    for name, what in _CAPABILITIES.items():
        if guest.capabilities.get(name):
            yield f"capability {name} is on: it {what}"
    if guest.capabilities.get("x-ignore-shared"):
        what = (
            "leaves shared memory out of the file"
            if guest.version >= _IGNORES_SHARED
            else "makes mapped-ram fail with 'Bad address' at the very end"
        )
        yield f"capability x-ignore-shared is on: it {what}"
    for name, (harmless, what) in _PARAMETERS.items():
        value = guest.parameters.get(name, harmless)
        if value != harmless:
            yield f"parameter {name} is {value!r}: {what}"
    if guest.parameters.get("direct-io") and disk is not None and not disk.direct_io:
        yield (
            "parameter direct-io is on, but this directory has no direct I/O "
            f"({disk.reason}): a migrate to it may kill QEMU"
        )
    if choice is not None and choice.engine is Engine.QEMU:
        bandwidth = int(guest.parameters.get("max-bandwidth", 0))
        if bandwidth and (disk is None or bandwidth < disk.rate):
            yield f"parameter max-bandwidth limits QEMU to {bandwidth >> 20} MiB/s"
    if choice is not None and not choice.stays:
        yield f"the guest is {guest.run_state} and ends in postmigrate"
