"""Save a running QEMU's guest, and leave it as it was found.

The order: inspect the guest, choose the engine, start the guardian, open the file and try direct
I/O, choose the settings, check the free space; only then change anything in QEMU. The engine has the
file written and resumes the guest. The file is made durable, read back, compared with the guest and
published.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from pyqmigrate.errors import (
    Cancelled,
    LiveSaveAbandoned,
    NoSpace,
    NotDurable,
    NotSupported,
    PyqmigrateError,
    QemuError,
    QemuGone,
    SnapshotError,
    UsageError,
)
from pyqmigrate.format.digest import Algorithm, digester
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.wire import MAGIC
from pyqmigrate.integrity.manifest import check_place, seal_path, write_manifest
from pyqmigrate.integrity.seal import start_seal
from pyqmigrate.io.companion_file import identify_snapshot
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.place import absolute
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Descriptors, stream_offset, target_path
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.vm.cancellation import check_cancelled, shielded
from pyqmigrate.vm.guest.clock import correct_clock, note_on_clock
from pyqmigrate.vm.guest.disks import DiskPlan
from pyqmigrate.vm.guest.files import files_of
from pyqmigrate.vm.guest.inspect import GuestInfo, inspect
from pyqmigrate.vm.guest.processor_time import ProcessorClock
from pyqmigrate.vm.guest.run_state import what_stopped
from pyqmigrate.vm.outgoing.device_state import DeviceStateRefused
from pyqmigrate.vm.outgoing.direct import save_direct
from pyqmigrate.vm.outgoing.disk_snapshots import remove_unused, stranded
from pyqmigrate.vm.outgoing.migrate import WhilePaused, Written
from pyqmigrate.vm.outgoing.options import SaveOptions, Then, VmSaveOptions
from pyqmigrate.vm.outgoing.qemu import save_qemu
from pyqmigrate.vm.outgoing.report import VmSaveReport
from pyqmigrate.vm.outgoing.timeline import Lane, Timeline
from pyqmigrate.vm.outgoing.transaction import SaveTransaction
from pyqmigrate.vm.plan.blockers import DeviceStateMethod
from pyqmigrate.vm.plan.disks import prepare, restore_needs
from pyqmigrate.vm.plan.engine import EngineChoice, choose_engine, fall_back
from pyqmigrate.vm.plan.live import LiveChoice, automatic_precopy, choose_live
from pyqmigrate.vm.plan.live_option import Instant, LiveMethod, LiveRequest
from pyqmigrate.vm.plan.plan import Plan, make_plan
from pyqmigrate.vm.qemu.exit import ProcessExit
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.record.recording import Recording

__all__ = ["save"]

_QUIT_TIMEOUT = 30.0  # seconds


async def save(
    qmp: str | os.PathLike[str], snapshot: str | os.PathLike[str], **options: Unpack[VmSaveOptions]
) -> VmSaveReport:
    """Save the guest of the QEMU whose monitor listens at ``qmp`` into the file ``snapshot``.

    The name appears, or is replaced, when the snapshot is complete, durable and verified. The
    options are those of :class:`~pyqmigrate.vm.VmSaveOptions`.

    If anything fails, or this is cancelled or its process killed, the guest is left as it was found
    and no file remains. Once it has its name, the snapshot and the disk snapshots that belong to it
    stay, also if this is cancelled or the name cannot be made durable (NotDurable); then it is not
    sealed, and QEMU is not ended.

    Raises UsageError, NotSupported (no live method is possible, or none is expected to keep
    ``max_pause``), QemuError (QemuGone if QEMU ended; LiveSaveAbandoned if the last possible method
    would have paused the guest for too long, or would not have ended), TargetError (NoSpace,
    NotDurable, DirectIORefused), GuestMemoryError, and SnapshotError if the written file does not
    match the guest.
    """
    checked = SaveOptions.check(options)
    path = absolute(target_path(os.fspath(snapshot)))  # the current directory may change
    if checked.seal is not None:
        digester(checked.seal)
        await asyncio.to_thread(check_place, seal_path(path))
    if checked.live is not None and checked.live.keep_digests:
        from pyqmigrate.io.page_table_file import check_page_table_place

        await asyncio.to_thread(check_page_table_place, path)
    if stream_offset(os.fspath(snapshot)):
        raise UsageError("a guest is saved to a file of its own: give no offset")
    async with await Monitor.connect(qmp) as monitor:
        with await inspect(monitor) as guest:
            return await _Save(monitor, guest, os.fspath(snapshot), path, checked).run()


class _Save:
    """One save; ``name`` is the snapshot as the caller named it, ``path`` is absolute."""

    def __init__(
        self, monitor: Monitor, guest: GuestInfo, name: str, path: Path, options: SaveOptions
    ) -> None:
        self.started_at = time.monotonic()
        self.monitor = monitor
        self.guest = guest
        self.name = name
        self.path = path
        self.options = options
        self.choice: EngineChoice
        self.live: LiveChoice | None = None
        self.request = options.live
        self.disks: DiskPlan | None
        self.recording: Recording
        self.notes: list[str] = []
        self.clock = ProcessorClock(guest)
        self.timeline = Timeline(self.started_at)

    async def run(self) -> VmSaveReport:
        request = self.options.live
        if request is not None and (self.guest.running or request.needs_digests_or_base):
            return await self._save_live(request)
        if request is not None:
            self.notes.append("the guest does not run, so no live method is needed")
        self.choice = choose_engine(self.guest, engine=self.options.engine)
        self._prepare_disks()
        return await self._save_stopped()

    async def _save_live(self, request: LiveRequest) -> VmSaveReport:
        """Try the possible methods until one is not abandoned."""
        choices = await shielded(asyncio.to_thread(choose_live, self.guest, request))
        for choice in choices:
            self.live = choice
            self.choice = choose_engine(self.guest, engine=choice.engine)
            if self._saves_changed:
                self.choice = replace(self.choice, way=DeviceStateMethod.DEVICES_ONLY)
            self._prepare_disks()
            try:
                return await self._attempt()
            except (LiveSaveAbandoned, NotSupported, DeviceStateRefused) as error:
                left = getattr(error, "__notes__", ())  # on a guest that was not restored
                if left or choice is choices[-1]:
                    for note in (*self.notes, *_not_tried(choice)):
                        error.add_note(f"({note}) ")
                    raise
                self.notes.append(f"the live method {choice.method} was abandoned: {error}")
        raise AssertionError("no method to try")

    async def _save_stopped(self) -> VmSaveReport:
        try:
            return await self._attempt_by_precopy() or await self._attempt()
        except DeviceStateRefused as error:
            if self.options.engine != "auto":
                raise
            # A migration may succeed; if not, it names the device.
            self.choice = fall_back(self.guest, error)
            self._prepare_disks()  # those of the first attempt were rolled back
            try:
                return await self._attempt()
            except QemuError as second:
                second.add_note(f"(engine direct: {error}) ")
                raise

    async def _attempt_by_precopy(self) -> VmSaveReport | None:
        """Save by method ``precopy`` where that pauses the guest much shorter; otherwise None."""
        if not self._resumes:
            return None
        self.live = await shielded(asyncio.to_thread(automatic_precopy, self.guest, self.choice))
        if self.live is None:
            return None
        self.request = LiveRequest(engine=self.options.engine, methods=(self.live.method,))
        try:
            return await self._attempt()
        except NotSupported as error:
            if getattr(error, "__notes__", ()):  # on a guest that was not restored
                raise
            self.notes.append(f"the guest was stopped for the whole save: {error}")
            self._prepare_disks()
            return None
        finally:
            self.live = self.request = None

    def _prepare_disks(self) -> None:
        self.disks = prepare(self.guest, self.path) if self.options.with_disks else None

    async def _attempt(self) -> VmSaveReport:
        self.recording = recording = await Recording.begin(
            self.monitor,
            self.guest,
            self.path,
            plan=self.disks,
            engine=self.choice.engine,
            way=self.choice.way,
            seal=self.options.seal,
        )
        transaction = SaveTransaction(
            self.monitor, self.guest, os.fspath(self.path), self.disks, recording, self.timeline
        )
        try:
            in_use = await asyncio.to_thread(files_of, self.guest)
            opening = transaction.open_output(self._direct_io, in_use=in_use, beside=self._beside())
            async with transaction, opening as output:
                plan = await shielded(asyncio.to_thread(self._plan, output))
                return await self._run(output, plan, transaction)
        except QemuGone as error:
            error.add_note(f"({self._process_state()}) ")
            if self.disks is not None:
                remove_unused(self.disks)
            if self.disks is not None and self.disks.taken and not transaction.published:
                for left in stranded(self.disks):
                    error.add_note(f"({left}) ")
            raise
        finally:
            if not transaction.published:
                recording.discard()

    def _beside(self) -> list[Path]:
        """Return the other files that are written."""
        request, record = self.options.live, self.recording.path
        if request is None or not request.keep_digests:
            return [record]
        from pyqmigrate.io.page_table_file import page_table_path

        return [record, page_table_path(self.path)]

    async def _run(
        self, output: OutputFile, plan: Plan, transaction: SaveTransaction
    ) -> VmSaveReport:
        self.timeline.add(Lane.FILE, "prepare", self.started_at, time.monotonic())
        written = await self._write(transaction, output, plan)
        file_size, allocated = os.fstat(output.fd).st_size, output.allocated_bytes()
        direct, reason = output.direct is not None, output.direct_io_reason
        await self._publish(output, written)
        modified = os.fstat(output.fd).st_mtime_ns
        seconds = time.monotonic() - self.started_at
        await transaction.commit(resume=self._resumes)
        pauses = transaction.events.pauses()
        clock_notes = await self._set_clock(written.downtime)
        run_state, end_notes = await self._end()
        if self.options.seal is not None:
            with self.timeline.phase(Lane.FILE, "seal"):
                await self._seal(written, self.options.seal, modified)
        if written.write_page_table is not None:
            with self.timeline.phase(Lane.FILE, "digests"):
                await self._keep_digests(written.write_page_table, output)
        resumed = self._resumes and self.guest.running
        return VmSaveReport(
            snapshot=self.name,
            engine=self.choice.engine,
            why=self.choice.why,
            settings=plan.changes.used(),
            direct_io=direct,
            direct_io_reason=reason,
            channels=self.options.channels,
            downtime=written.downtime,
            seconds=seconds,
            bytes_written=written.bytes_written,
            bytes_allocated=allocated,
            file_size=file_size,
            rate=written.bytes_written / seconds if seconds else 0.0,
            run_state_before=self.guest.run_state,
            run_state_after=run_state,
            disks=tuple(
                restore_needs(self.guest.disks, resumed=resumed, with_disks=self.options.with_disks)
            ),
            record=os.fspath(self.recording.path) if self.recording.published else None,
            seal=self.options.seal,
            method=None if self.live is None else self.live.method,
            method_why="" if self.live is None else self.live.why,
            instant=Instant.START if self.live is None else self.live.instant,
            rounds=written.rounds,
            slowdown=written.slowdown,
            base=written.base,
            changed_pages=written.changed_pages,
            timeline=self.timeline.phases(pauses, runs_at_first=self.guest.running),
            notes=(
                *self.notes,
                *plan.notes,
                *written.notes,
                *self.recording.notes,
                *clock_notes,
                *end_notes,
                *transaction.rollback_errors,
            ),
        )

    @property
    def _saves_changed(self) -> bool:
        return self.live is not None and self.live.method is LiveMethod.CHANGED

    @property
    def _direct_io(self) -> DirectIO:
        """Whether to try direct I/O: a background snapshot is written through the page cache."""
        background = self.live is not None and self.live.method is LiveMethod.BACKGROUND
        return DirectIO.OFF if background else self.options.direct_io

    @property
    def _resumes(self) -> bool:
        """Whether the guest shall run after the save."""
        if self.options.then is None:
            return self.guest.running
        return self.options.then is Then.RESUME

    def _plan(self, output: OutputFile) -> Plan:
        """Choose the settings; raise NoSpace, before QEMU is changed, if the file cannot fit."""
        plan = make_plan(
            self.guest,
            self.choice,
            channels=self.options.channels,
            direct=output.direct is not None,
            sparse=self.options.sparse,
            live=None if self.live is None else self.live.method,
            max_pause=None if self.options.live is None else self.options.live.max_pause,
            with_disks=self.disks is not None,
            # How much a save of changed pages writes is known when they were found.
            free=None if self._saves_changed else output.free_bytes(),
        )
        if plan.fits is False and plan.free is not None:
            raise NoSpace(
                f"the snapshot needs {plan.need >> 20} MiB and {plan.free >> 20} MiB are free",
                output.name,
            )
        return plan

    async def _write(self, transaction: SaveTransaction, output: OutputFile, plan: Plan) -> Written:
        options = self.options
        while_paused: WhilePaused | None = transaction.take_disks if self.disks else None
        await transaction.create_overlays()
        if self.live is not None and self.request is not None:
            return await self._write_live(transaction, output, plan, self.request, self.live)
        if self.choice.way is None:
            return await save_qemu(
                transaction,
                output,
                plan.changes,
                run_state=self.guest.run_state,
                running=self.guest.running,
                resume=self._resumes,
                while_paused=while_paused,
                progress=options.progress,
            )
        return await save_direct(
            transaction,
            self.guest,
            self.choice.way,
            output,
            plan.changes,
            channels=options.channels,
            sparse=plan.sparse,
            seal=options.seal,
            resume=self._resumes,
            describe=options.describe,
            while_paused=while_paused,
            progress=options.progress,
        )

    async def _write_live(
        self,
        transaction: SaveTransaction,
        output: OutputFile,
        plan: Plan,
        request: LiveRequest,
        live: LiveChoice,
    ) -> Written:
        from pyqmigrate.vm.outgoing.live_methods import save_by_method
        from pyqmigrate.vm.outgoing.live_save import LiveSave

        if not self._saves_changed:  # that takes hardly longer
            await self.clock.settle()
        self.clock.begin()
        written = await save_by_method(
            LiveSave(
                transaction=transaction,
                guest=self.guest,
                output=output,
                plan=plan,
                engine=self.choice,
                request=request,
                live=live,
                options=self.options,
                resume=self._resumes,
                while_paused=transaction.take_disks if self.disks else None,
                see_disks=self.recording.see_disks,
            )
        )
        return replace(written, slowdown=self.clock.slowdown() if self._resumes else None)

    async def _set_clock(self, downtime: float | None) -> list[str]:
        if not self._resumes:
            return []
        if self.options.set_time:
            return await correct_clock(self.guest.pid, self.options.guest_agent)
        return note_on_clock(downtime or 0.0)

    async def _seal(self, written: Written, algorithm: Algorithm, mtime_ns: int) -> None:
        """Write the seal beside the published snapshot."""
        if written.manifest is not None:
            manifest = written.manifest(mtime_ns)
            await asyncio.to_thread(write_manifest, seal_path(self.path), manifest)
            return
        # QEMU wrote it on this host.
        job = start_seal(self.path, algorithm=algorithm, bitmap_order=sys.byteorder)
        try:
            await asyncio.to_thread(job.result)
        except BaseException:
            job.cancel()
            await shielded(asyncio.to_thread(job.join))
            raise

    async def _keep_digests(
        self, write: Callable[[Path, SnapshotId], None], output: OutputFile
    ) -> None:
        """Write the digests of the pages beside the published snapshot."""
        from pyqmigrate.io.page_table_file import page_table_path

        snapshot = await asyncio.to_thread(identify_snapshot, self.path, output.fd)
        place = page_table_path(self.path)
        await shielded(asyncio.to_thread(write, place, snapshot))

    async def _publish(self, output: OutputFile, written: Written) -> None:
        """Make the file durable, verify it and give it its name, unless cancelled before that."""
        check_cancelled()
        cancelled = threading.Event()
        began_at = time.monotonic()  # what it does now

        def check() -> None:
            nonlocal began_at
            self.timeline.add(Lane.FILE, "fsync", began_at, time.monotonic())
            with self.timeline.phase(Lane.FILE, "verify"):
                _verify(output, self.guest)
                self.recording.prepare(output, resumed=self._resumes)
                if written.confirm is not None:
                    written.confirm()
            began_at = time.monotonic()
            if cancelled.is_set():
                raise Cancelled("cancelled")

        def publish() -> None:
            try:
                output.publish(MAGIC, check)
            finally:
                if output.published:
                    self.timeline.add(Lane.FILE, "name", began_at, time.monotonic())
                    self.recording.publish()

        publishing = asyncio.ensure_future(asyncio.to_thread(publish))
        try:
            await asyncio.shield(publishing)
        except NotDurable as error:
            if self.disks is not None and self.recording.published:
                error.add_note(f"(the guest's disks are overlays now: see {self.recording.path}) ")
            raise
        except asyncio.CancelledError:
            cancelled.set()
            with contextlib.suppress(PyqmigrateError):
                await shielded(publishing)
            raise

    async def _end(self) -> tuple[str | None, list[str]]:
        """Quit QEMU if asked to; return the run state, None if QEMU has ended, and notes.

        The end is waited for: until then QEMU's locks on its images would fail a restore.
        """
        if self.options.then is not Then.QUIT:
            run_state = str((await self.monitor.execute("query-status"))["status"])
            return run_state, self._notes(run_state)
        with contextlib.closing(ProcessExit(self.guest.pid)) as process_exit:
            with contextlib.suppress(QemuGone):  # it may hang up before it answers
                await self.monitor.execute("quit")
            if await process_exit.wait(_QUIT_TIMEOUT):
                await asyncio.to_thread(self.recording.see_end)
                return None, self._notes(None)
            if not process_exit.known:
                return None, ["QEMU was told to quit; its process cannot be watched from here"]
            return None, [
                f"QEMU was told to quit, but process {self.guest.pid} has not ended within "
                f"{_QUIT_TIMEOUT:g} s and may still lock its disks"
            ]

    def _notes(self, after: str | None) -> list[str]:
        notes = []
        before = self.guest.run_state
        if (stopped := what_stopped(before)) is not None:
            notes.append(stopped)
        if after == "postmigrate" and before != after:
            notes.append(
                f"the guest was {before} and is postmigrate now: it stays stopped, but QEMU migrates "
                "it again only after it has run (cont)"
            )
        return notes

    def _process_state(self) -> str:
        pid = self.guest.pid
        if pid is None:
            return "its process is not known"
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return f"process {pid} has ended"
        return f"process {pid} is a zombie" if state == "Z" else f"process {pid} still exists"


def _not_tried(choice: LiveChoice) -> Iterator[str]:
    """Yield why each other live method was not tried."""
    for method, reasons in choice.refused.items():
        yield f"live method {method} was not tried: {', '.join(reasons)}"


def _verify(output: OutputFile, guest: GuestInfo) -> None:
    """Read the structure back and compare it with the guest."""
    with (
        output.opened_for_reading() as fd,
        MappedRamSnapshot(StreamFile.open(Descriptors(fd)).without_header()) as snapshot,
    ):
        snapshot.verify()
        saved: dict[str, Any] = {name: block.length for name, block in snapshot.blocks.items()}
        expected = {block.name: block.length for block in guest.blocks}
        if saved != expected:
            raise SnapshotError(f"the file has blocks {saved}, the guest {expected}")
        if any(block.external for block in snapshot.blocks.values()):
            raise SnapshotError("the content of a block is not in the file")
        if snapshot.machine != guest.machine:
            raise SnapshotError(
                f"the file has machine {snapshot.machine!r}, the guest {guest.machine!r}"
            )
