"""Save a running QEMU's guest, and leave it as it was found.

What happens, in this order: look, choose the engine, start the guardian, open the file and try
direct I/O, choose the settings, check the space; only then QEMU is touched. The engine has the file
written and lets the guest go on. The file is made durable, its structure is read back and compared
with the guest, and it gets its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import (
    Cancelled,
    NoSpace,
    NotDurable,
    PyqmigrateError,
    QemuError,
    QemuGone,
    SnapshotError,
    UsageError,
)
from pyqmigrate.format.digest import Algorithm, digester
from pyqmigrate.format.stream.writer import MAGIC
from pyqmigrate.integrity.manifest import check_place, seal_path, write_manifest
from pyqmigrate.integrity.seal import start_seal
from pyqmigrate.io.channels import check_channels
from pyqmigrate.io.place import absolute
from pyqmigrate.io.target import Descriptors, DirectIO, OutputFile, stream_offset, target_path
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.snapshot.save.writer import Sparse
from pyqmigrate.vm.cancellation import check_cancelled, shielded
from pyqmigrate.vm.guest import disks
from pyqmigrate.vm.guest.clock import correct_clock, note_on_clock
from pyqmigrate.vm.guest.files import files_of
from pyqmigrate.vm.guest.inspect import GuestInfo, inspect
from pyqmigrate.vm.guest.run_state import what_stopped
from pyqmigrate.vm.outgoing.direct import DeviceStateRefused, save_direct
from pyqmigrate.vm.outgoing.migrate import AtInstant, ProgressCallback, Written
from pyqmigrate.vm.outgoing.qemu import save_qemu
from pyqmigrate.vm.outgoing.transaction import SaveTransaction
from pyqmigrate.vm.plan.engine import Engine, EngineChoice, choose_engine, fall_back
from pyqmigrate.vm.plan.plan import Plan, make_plan
from pyqmigrate.vm.plan.settings import UsedSetting
from pyqmigrate.vm.qemu.exit import ProcessExit
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.record.recording import Recording

__all__ = ["Then", "UsedSetting", "VmSaveReport", "save"]

_QUIT_TIMEOUT = 30.0  # seconds


class Then(StrEnum):
    """What becomes of the guest after a save."""

    RESUME = "resume"
    PAUSE = "pause"
    QUIT = "quit"


@dataclass(frozen=True)
class VmSaveReport:
    """What a save did.

    ``downtime`` is how many seconds the guest stood still, from QEMU's event STOP to RESUME; None
    where it did not run before or does not again; ``seconds`` is wall time up to the
    moment at which the snapshot had its name. ``bytes_written`` went to the file,
    ``bytes_allocated`` is what it holds on disk, ``rate`` is ``bytes_written`` a second.
    ``run_state_after`` is None after ``quit``. ``disks`` are sentences on what a restore needs of
    the writable disks, ``record`` is the file that describes the VM
    (:mod:`pyqmigrate.vm.record.contents`), None where it could not be given its name. ``seal`` is
    the algorithm of the seal, if any. ``notes`` are things that somebody should know.
    """

    snapshot: str
    engine: Engine
    why: str
    settings: Mapping[str, UsedSetting]
    direct_io: bool
    direct_io_reason: str
    channels: int
    downtime: float | None
    seconds: float
    bytes_written: int
    bytes_allocated: int
    file_size: int
    rate: float
    run_state_before: str
    run_state_after: str | None
    disks: tuple[str, ...]
    record: str | None
    seal: Algorithm | None = None
    notes: tuple[str, ...] = field(default=())


async def save(
    qmp: str | os.PathLike[str],
    snapshot: str | os.PathLike[str],
    *,
    engine: str = "auto",
    live: bool = False,
    then: Then | str | None = None,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    sparse: Sparse | str = Sparse.AUTO,
    with_disks: bool = False,
    seal: Algorithm | str | None = None,
    describe: bool = True,
    set_time: bool = False,
    guest_agent: str | os.PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
) -> VmSaveReport:
    """Save the guest of the QEMU whose monitor listens at ``qmp`` into the file ``snapshot``.

    The name appears when the snapshot is whole, durable and verified; one that is there already
    is replaced.

    engine: ``qemu``, ``direct``, or ``auto``: direct where nothing would be missed.
    live: the guest runs while most of it is saved; only engine qemu can.
    then: what becomes of the guest; None leaves it as it was found. ``quit`` ends QEMU, once the
        snapshot has its name, and its end is waited for, half a minute at most.
    channels: threads, or multifd channels, that move pages: 1 to 255.
    sparse: ``exact`` allocates no zero page, ``dense`` all of them.
    with_disks: take snapshots of the writable disks at the same instant (:mod:`pyqmigrate.vm
        .disks`).
    seal: an :class:`~pyqmigrate.format.digest.Algorithm`: a seal is written beside the snapshot
        when it has its name and the guest is as it shall be. With engine qemu the file is read for
        it. Should that fail, the snapshot stays.
    describe: where QEMU writes no description of its device state (``xen-save-devices-state``),
        have a second, stopped QEMU of the same machine make it (:mod:`pyqmigrate.vm.twin.twin`)
        once the guest goes on; the notes say where that is not possible.
    set_time: set the clock of a guest that goes on, by its agent. Where that fails, or takes more
        than five seconds, a note says so.
    guest_agent: the path of the agent's socket; None finds it in QEMU's command line.
    progress: called with a :class:`~pyqmigrate.io.job.Progress` about ten times a second.

    Whatever fails, and when this is cancelled or its process killed, the guest is put back as it
    was found and nothing is left. Only where the snapshot has its name, and that cannot be made
    durable (NotDurable), it stays, with the snapshots of disks that belong to it; it is not sealed,
    and QEMU is not ended. Raises UsageError, NotSupported, QemuError (QemuGone when QEMU ended),
    TargetError (NoSpace, NotDurable, DirectIORefused), GuestMemoryError, SnapshotError when what
    was written is not what the guest has.
    """
    request = _Request(
        os.fspath(snapshot),
        engine,
        live,
        None if then is None else parse_enum(Then, then, "then"),
        check_channels(channels),
        parse_enum(DirectIO, direct_io, "direct_io"),
        parse_enum(Sparse, sparse, "sparse"),
        with_disks,
        progress,
        None if seal is None else parse_enum(Algorithm, seal, "seal"),
        describe,
        absolute(target_path(snapshot)),
        set_time,
        guest_agent,
    )
    if request.seal is not None:
        digester(request.seal)
        await asyncio.to_thread(check_place, seal_path(request.path))
    if stream_offset(request.snapshot):
        raise UsageError("a guest is saved into a file of its own: without an offset")
    async with await Monitor.connect(qmp) as monitor:
        with await inspect(monitor) as guest:
            return await _Save(monitor, guest, request).run()


@dataclass(frozen=True)
class _Request:
    snapshot: str
    engine: str
    live: bool
    then: Then | None
    channels: int
    direct_io: DirectIO
    sparse: Sparse
    with_disks: bool
    progress: ProgressCallback | None
    seal: Algorithm | None
    describe: bool
    path: Path  # absolute: the current directory may change
    set_time: bool
    guest_agent: str | os.PathLike[str] | None


class _Save:
    """One save under way."""

    def __init__(self, monitor: Monitor, guest: GuestInfo, request: _Request) -> None:
        self.started = time.monotonic()
        self.monitor = monitor
        self.guest = guest
        self.request = request
        self.choice: EngineChoice = choose_engine(guest, engine=request.engine, live=request.live)
        self.disks = disks.prepare(guest, request.path) if request.with_disks else None
        self.recording: Recording

    async def run(self) -> VmSaveReport:
        try:
            return await self._attempt()
        except DeviceStateRefused as error:
            if self.request.engine != "auto":
                raise
            # A migration may succeed; where it does not, it says which device is in the way.
            self.choice = fall_back(self.guest, error)
            if self.disks is not None:  # those of the first attempt are undone
                self.disks = disks.prepare(self.guest, self.request.path)
            try:
                return await self._attempt()
            except QemuError as second:
                second.add_note(f"(engine direct: {error}) ")
                raise

    async def _attempt(self) -> VmSaveReport:
        self.recording = recording = await Recording.begin(
            self.monitor,
            self.guest,
            self.request.path,
            plan=self.disks,
            engine=self.choice.engine,
            way=self.choice.way,
            seal=self.request.seal,
        )
        transaction = SaveTransaction(
            self.monitor, self.guest, os.fspath(self.request.path), self.disks, recording
        )
        try:
            in_use = await asyncio.to_thread(files_of, self.guest)
            opened = transaction.opened(
                self.request.direct_io, in_use=in_use, beside=[recording.path]
            )
            async with transaction, opened as target:
                plan = await shielded(asyncio.to_thread(self._plan, target))
                return await self._run(target, plan, transaction)
        except QemuGone as error:
            error.add_note(f"({self._what_became_of_qemu()}) ")
            if self.disks is not None and self.disks.taken and not transaction.published:
                for left in disks.stranded(self.disks):
                    error.add_note(f"({left}) ")
            raise
        finally:
            if not transaction.published:
                recording.discard()

    async def _run(
        self, target: OutputFile, plan: Plan, transaction: SaveTransaction
    ) -> VmSaveReport:
        written = await self._engine(transaction, target, plan)
        file_size, allocated = os.fstat(target.fd).st_size, target.allocated_bytes()
        direct, reason = target.direct is not None, target.direct_io_reason
        await self._publish(target, transaction)
        modified = os.fstat(target.fd).st_mtime_ns
        seconds = time.monotonic() - self.started
        await transaction.end(resume=self._resumes)
        clock = await self._clock(written.downtime)
        after, late = await self._end()
        await self._seal(written, modified)
        resumed = self._resumes and self.guest.running
        return VmSaveReport(
            snapshot=self.request.snapshot,
            engine=self.choice.engine,
            why=self.choice.why,
            settings=plan.changes.used(),
            direct_io=direct,
            direct_io_reason=reason,
            channels=self.request.channels,
            downtime=written.downtime,
            seconds=seconds,
            bytes_written=written.bytes_written,
            bytes_allocated=allocated,
            file_size=file_size,
            rate=written.bytes_written / seconds if seconds else 0.0,
            run_state_before=self.guest.run_state,
            run_state_after=after,
            disks=tuple(
                disks.restore_needs(
                    self.guest.disks, resumed=resumed, with_disks=self.request.with_disks
                )
            ),
            record=os.fspath(self.recording.path) if self.recording.published else None,
            seal=self.request.seal,
            notes=(
                *plan.notes,
                *written.notes,
                *self.recording.notes,
                *clock,
                *late,
                *transaction.trouble,
            ),
        )

    @property
    def _resumes(self) -> bool:
        """Whether the guest is to run when the save is done."""
        if self.request.then is None:
            return self.guest.running
        return self.request.then is Then.RESUME

    def _plan(self, target: OutputFile) -> Plan:
        """Fail before QEMU is touched where the file cannot fit."""
        plan = make_plan(
            self.guest,
            self.choice,
            channels=self.request.channels,
            direct=target.direct is not None,
            sparse=self.request.sparse,
            live=self.request.live,
            with_disks=self.disks is not None,
            free=target.free_bytes(),
        )
        if plan.fits is False and plan.free is not None:
            raise NoSpace(
                f"the snapshot needs {plan.need >> 20} MiB and {plan.free >> 20} MiB are free",
                target.name,
            )
        return plan

    async def _engine(
        self, transaction: SaveTransaction, target: OutputFile, plan: Plan
    ) -> Written:
        request = self.request
        # Before the snapshot has its name nothing may happen that cannot be undone.
        while_paused: AtInstant | None = transaction.take_disks if self.disks else None
        if self.choice.way is None:
            return await save_qemu(
                transaction,
                target,
                plan.changes,
                run_state=self.guest.run_state,
                running=self.guest.running,
                live=request.live,
                resume=self._resumes,
                while_paused=while_paused,
                progress=request.progress,
            )
        return await save_direct(
            transaction,
            self.guest,
            self.choice.way,
            target,
            plan.changes,
            channels=request.channels,
            sparse=plan.sparse,
            seal=request.seal,
            resume=self._resumes,
            describe=request.describe,
            while_paused=while_paused,
            progress=request.progress,
        )

    async def _clock(self, downtime: float | None) -> list[str]:
        if not self._resumes:
            return []
        if self.request.set_time:
            return await correct_clock(self.guest.pid, self.request.guest_agent)
        return note_on_clock(downtime or 0.0)

    async def _seal(self, written: Written, mtime_ns: int) -> None:
        """Beside the snapshot, which is there and stays."""
        if self.request.seal is None:
            return
        path = self.request.path
        if written.manifest is not None:
            manifest = written.manifest(mtime_ns)
            await asyncio.to_thread(write_manifest, seal_path(path), manifest)
            return
        # QEMU wrote it on this host.
        job = start_seal(path, algorithm=self.request.seal, bitmap_order=sys.byteorder)
        try:
            await asyncio.to_thread(job.result)
        except BaseException:
            job.cancel()
            await shielded(asyncio.to_thread(job.join))
            raise

    async def _publish(self, target: OutputFile, transaction: SaveTransaction) -> None:
        """Durable, verified, named. Once cancelled, it gets no name, unless it has it already."""
        check_cancelled()
        cancelled = threading.Event()

        def check() -> None:
            _verify(target, self.guest)
            self.recording.prepare(target, resumed=self._resumes)
            if cancelled.is_set():
                raise Cancelled("cancelled")

        def publish() -> None:
            try:
                target.publish(MAGIC, check)
            finally:
                if target.published:
                    self.recording.publish()

        publishing = asyncio.ensure_future(asyncio.to_thread(publish))
        try:
            await asyncio.shield(publishing)
        except NotDurable as error:
            if self.disks is not None and self.recording.published:
                error.add_note(f"(the disks go on in overlays: see {self.recording.path}) ")
            raise
        except asyncio.CancelledError:
            cancelled.set()
            with contextlib.suppress(PyqmigrateError):
                await shielded(publishing)
            raise
        finally:
            transaction.published = target.published

    async def _end(self) -> tuple[str | None, list[str]]:
        """Quit if that was asked for; what the guest is doing now, and what there is to note.

        Whoever restores at once would meet QEMU's locks on images if it had not ended.
        """
        if self.request.then is not Then.QUIT:
            after = str((await self.monitor.execute("query-status"))["status"])
            return after, self._notes(after)
        with contextlib.closing(ProcessExit(self.guest.pid)) as ending:
            with contextlib.suppress(QemuGone):  # it may hang up before it answers
                await self.monitor.execute("quit")
            if await ending.wait(_QUIT_TIMEOUT):
                await asyncio.to_thread(self.recording.see_end)
                return None, self._notes(None)
            if not ending.known:
                return None, ["QEMU was told to quit; whether it has cannot be seen from here"]
            return None, [
                f"QEMU was told to quit; process {self.guest.pid} has not ended within "
                f"{_QUIT_TIMEOUT:g} s, and may still have its disks locked"
            ]

    def _notes(self, after: str | None) -> list[str]:
        notes = []
        before = self.guest.run_state
        if (stopped := what_stopped(before)) is not None:
            notes.append(stopped)
        if after == "postmigrate" and before != after:
            notes.append(
                f"the guest was {before} and is postmigrate now: it keeps still, but QEMU migrates "
                "it again only when it has run (cont)"
            )
        return notes

    def _what_became_of_qemu(self) -> str:
        pid = self.guest.pid
        if pid is None:
            return "which process it was is not known"
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return f"process {pid} is no more"
        return f"process {pid} is a zombie" if state == "Z" else f"process {pid} is still there"


def _verify(target: OutputFile, guest: GuestInfo) -> None:
    """Read the structure back, and compare it with what QEMU says the guest is."""
    with target.opened_for_reading() as fd, MappedRamSnapshot(Descriptors(fd)) as snapshot:
        snapshot.verify()
        saved: dict[str, Any] = {name: b.length for name, b in snapshot.blocks.items()}
        expected = {block.name: block.length for block in guest.blocks}
        if saved != expected:
            raise SnapshotError(f"the file has blocks {saved}, the guest {expected}")
        if any(block.external for block in snapshot.blocks.values()):
            raise SnapshotError("a block's content is not in the file")
        if snapshot.machine != guest.machine:
            raise SnapshotError(
                f"the file is of machine {snapshot.machine!r}, the guest of {guest.machine!r}"
            )
