"""One attempt to restore: by mapped memory, or by a load.

QEMU does not compare machine type and RAM blocks of a snapshot with its own as it should; that is
done here before it loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyqmigrate.errors import NotSupported, QemuError, QemuGone, QemuRefused
from pyqmigrate.vm.cancellation import acquired
from pyqmigrate.vm.guest.clock import correct_clock, note_on_clock
from pyqmigrate.vm.guest.ramblock import parse_ramblock
from pyqmigrate.vm.incoming.compatibility import compare_blocks, compare_devices, compare_type
from pyqmigrate.vm.incoming.identity import runs_already, shared_identity
from pyqmigrate.vm.incoming.incoming_settings import Incoming
from pyqmigrate.vm.incoming.incoming_stream import IncomingStream
from pyqmigrate.vm.incoming.incoming_streams import IncomingStreams
from pyqmigrate.vm.incoming.instant_start import LoadedInstant, NotStarted, explained
from pyqmigrate.vm.incoming.load import take_in
from pyqmigrate.vm.incoming.loading import LoadFailed, settle
from pyqmigrate.vm.incoming.mapped_start import StartedRestore
from pyqmigrate.vm.incoming.options import Mode, RestoreOptions
from pyqmigrate.vm.incoming.prefetch import PrefetchState
from pyqmigrate.vm.incoming.ram_files import RamFiles, loadable
from pyqmigrate.vm.incoming.ram_mapping import Mapped
from pyqmigrate.vm.incoming.report import RestoredVm, RestoreReport
from pyqmigrate.vm.incoming.run_state import describe_state, resumes_here, shall_resume
from pyqmigrate.vm.incoming.saved_machine import SavedMachine, read_saved_machine
from pyqmigrate.vm.incoming.source import RestoreSource
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.launch import QemuSession, answered, launch
from pyqmigrate.vm.qemu.monitor import EndedMonitor

if TYPE_CHECKING:
    from pyqmigrate.snapshot.increment import IncrementSnapshot
    from pyqmigrate.vm.incoming.lazy_process import KeeperProcess
    from pyqmigrate.vm.incoming.lazy_recording import LazyRecorder
    from pyqmigrate.vm.incoming.recording import Recorder

__all__ = ["RestoreAttempt"]

# Matches what a QEMU prints that does not start because its memory cannot be mapped.
_ABOUT_MEMORY = (
    r"backing (store|file)|backend file|memory[- ]backend|guest (RAM|memory)|mem-path|mmap|memdev"
)


_SEALED = "the snapshot is sealed: its clear pages are zeros in the file and were not scanned"


async def _load_stream(qemu: QemuSession, incoming: Incoming, differences: Sequence[str]) -> float:
    """As take_in; an error lists the ``differences``, which may have caused it."""
    try:
        return await take_in(qemu, incoming)
    except QemuError as error:
        if not differences or isinstance(error, QemuRefused):
            raise
        raise explained(error, differences) from error


@contextlib.asynccontextmanager
async def _merged(increment: IncrementSnapshot) -> AsyncIterator[Incoming]:
    # Loaded only for this: it imports all that converts.
    from pyqmigrate.vm.incoming.merged_stream import merged_stream

    async with merged_stream(increment) as fd:
        yield Incoming({}, 0, stream=fd)


@dataclass(frozen=True)
class RestoreAttempt:
    """A restore with checked options, begun at ``started_at`` (monotonic seconds)."""

    streams: IncomingStreams
    options: RestoreOptions
    started_at: float
    notes: tuple[str, ...] = field(default=())

    @property
    def source(self) -> RestoreSource:
        return self.streams.source

    async def instant_or_load(self, started: StartedRestore, command: CommandLine) -> RestoredVm:
        """Finish an instant restore; load with ``command`` if the started QEMU fails on its memory."""
        try:
            return await self._instant(started)
        except NotStarted as error:
            if self.options.mode is Mode.INSTANT or not re.search(
                _ABOUT_MEMORY, str(error), re.IGNORECASE
            ):
                raise
            why = f"no instant restore: with mapped memory, {error}"
            try:
                return await self.lazy_or_load(command, why)
            except QemuError as second:
                raise QemuError(f"{second}\n{why}") from second

    async def _instant(self, started: StartedRestore) -> RestoredVm:
        mapped, files = started.mapped, started.files
        building = asyncio.ensure_future(self.streams.get(mapped.blocks))
        # If QEMU does not start either, its exception is never retrieved.
        building.add_done_callback(lambda task: task.cancelled() or task.exception())
        other_guests = self._start_lookup()
        try:
            async with await self._wait_for_monitor(answered(started.qemu)) as qemu:
                differences = await self._compare(qemu, mapped.command)
                stream = await building
                await asyncio.to_thread(files.clear)
                recorder = await self._start_recording(qemu, mapped.blocks)
                fd = stream.open_for_reading()
                try:
                    incoming = Incoming({"incoming-stream": fd}, self.source.snapshot.offset)
                    seconds = await _load_stream(qemu, incoming, differences)
                    return await self._hand_over(
                        qemu,
                        mapped.command,
                        other_guests,
                        seconds,
                        incoming,
                        recorder,
                        **self._instant_report(mapped, files, differences, stream),
                    )
                except BaseException:
                    if recorder is not None:
                        recorder.drop()
                    raise
                finally:
                    os.close(fd)
        finally:
            building.cancel()
            files.close()

    async def finish_instant(self, loaded: LoadedInstant) -> RestoredVm:
        """Connect to a guest that was loaded without an event loop, and report; after an error it is
        ended."""
        other_guests = self._start_lookup()
        try:
            session = await answered(loaded.qemu)
        except QemuGone:  # after the guest ran: the restore was complete
            session = QemuSession(loaded.qemu, EndedMonitor(loaded.version))
        async with session as qemu:
            qemu.seconds = loaded.start_seconds
            qemu.has_run = True
            return await self._hand_over(
                qemu,
                loaded.mapped.command,
                other_guests,
                loaded.load_seconds,
                loaded.incoming,
                state=loaded.run_state,
                **self._instant_report(loaded.mapped, loaded.files, loaded.differences, loaded),
            )

    def _instant_report(
        self,
        mapped: Mapped,
        files: RamFiles,
        differences: Sequence[str],
        stream: IncomingStream | LoadedInstant,
    ) -> dict[str, Any]:
        """Return what the report of an instant restore has, and others have not."""
        sealed = (_SEALED,) if stream.sealed else ()
        return {
            "mode": Mode.INSTANT,
            "why": self._why_instant(),
            "mapped_blocks": tuple(mapped.blocks),
            "stale_pages": stream.stale_pages,
            "stale_seconds": stream.stale_seconds,
            "notes": (*self.notes, *differences, *mapped.notes, *files.notes, *sealed),
        }

    def _why_instant(self) -> str:
        if self.source.increment is None:
            return "the memory is mapped from the snapshot"
        return (
            f"the memory is mapped from the base {self.source.mapped.source.name!r}, and "
            f"{self.source.increment.changed_pages} changed pages are loaded"
        )

    async def lazy_or_load(self, command: CommandLine, why: str = "") -> RestoredVm:
        """Restore lazily, or by a load if that is not possible and mode auto allows it; ``why`` says why
        it is not instant."""
        # Loaded only for this, as it imports all that an instant restore does without.
        from pyqmigrate.vm.incoming.lazy import LazyAttempt

        attempt = LazyAttempt(self.streams, self.options, self.started_at, self.notes)
        try:
            return await attempt.lazily(command, why or "asked for")
        except NotSupported as error:
            if self.options.mode is Mode.LAZY:
                raise
            return await self.load(command, f"{why}; {error}")

    async def load(self, command: CommandLine, why: str) -> RestoredVm:
        """Restore by a load; ``why`` is for the report."""
        options = self.options
        increment = self.source.increment
        if increment is not None:
            if options.mode is Mode.POSTCOPY:
                raise NotSupported("mode postcopy cannot load an increment: use instant or load")
            note = "the increment and its base are merged, and streamed to QEMU"
            async with _merged(increment) as incoming:
                return await self._load(command, why, Mode.LOAD, incoming, note)
        if options.mode is Mode.POSTCOPY:
            with self._whole_file({}, 0) as incoming:
                return await self._load(command, why, Mode.POSTCOPY, incoming)
        reading = await acquired(
            asyncio.to_thread(self.source.choose_reading, options.channels, options.direct_io),
            self.source.close_reading,
        )
        try:
            direct = {"direct": reading.direct.fd} if reading.direct else {}
            note = f"reading: {reading.why}"
            with self._whole_file(direct, reading.channels) as incoming:
                return await self._load(command, why, Mode.LOAD, incoming, note)
        finally:
            self.source.close_reading(reading)

    async def _load(
        self, command: CommandLine, why: str, mode: Mode, incoming: Incoming, *notes: str
    ) -> RestoredVm:
        command, changes = loadable(command, self.source.snapshot)
        with await self._files(command) as files:
            options = self.options
            other_guests = self._start_lookup()
            launching = launch(command, options.pass_fds, **options.connections())
            async with await self._wait_for_monitor(launching) as qemu:
                differences = await self._compare(qemu, command)
                await asyncio.to_thread(files.clear)
                seconds = await _load_stream(qemu, incoming, differences)
                return await self._hand_over(
                    qemu,
                    command,
                    other_guests,
                    seconds,
                    incoming,
                    mode=mode,
                    why=why,
                    notes=(*self.notes, *differences, *changes, *files.notes, *notes),
                )

    @contextlib.contextmanager
    def _whole_file(self, direct: dict[str, int], channels: int) -> Iterator[Incoming]:
        fd = self.source.open_again()
        try:
            yield Incoming(
                {"buffered": fd, **direct},
                self.source.snapshot.offset,
                self.source.capabilities,
                channels,
                bool(direct),
                self.options.mode is Mode.POSTCOPY,
            )
        finally:
            os.close(fd)

    async def _files(self, command: CommandLine) -> RamFiles:
        """Check the memory files before QEMU starts."""
        return await acquired(
            asyncio.to_thread(RamFiles, command, self.source.snapshot), RamFiles.close
        )

    async def _wait_for_monitor(self, session: Awaitable[QemuSession]) -> QemuSession:
        try:
            return await session
        except QemuError as error:
            raise NotStarted(str(error)) from error

    async def _compare(self, qemu: QemuSession, command: CommandLine) -> list[str]:
        """Compare QEMU with the snapshot, and keep the guest stopped after the load; return notes.

        If anything fails before the end, the guest has not run.
        """
        await compare_type(qemu.monitor, self.source.snapshot)
        notes = await compare_devices(qemu.monitor, command, self.saved)
        await compare_blocks(qemu.monitor, self.source.snapshot)
        if self._resumes_here:
            await qemu.monitor.execute("stop")
        else:
            qemu.has_run = True
        return notes

    @property
    def _resumes_here(self) -> bool:
        """Whether the guest is resumed here, not by QEMU as soon as it has loaded."""
        return self.options.mode is not Mode.POSTCOPY and resumes_here(self.saved, self.options)

    @functools.cached_property
    def saved(self) -> SavedMachine:
        return read_saved_machine(self.source.snapshot)

    async def _hand_over(
        self,
        qemu: QemuSession,
        command: CommandLine,
        other_guests: asyncio.Future[bool],
        seconds: float,
        incoming: Incoming,
        recorder: Recorder | LazyRecorder | None = None,
        keeper: KeeperProcess | None = None,
        *,
        state: str | None = None,
        notes: tuple[str, ...],
        **details: Any,
    ) -> RestoredVm:
        shared = shared_identity(command) if await other_guests else None
        if shared is not None and shared not in notes:
            notes = (*notes, shared)
        # The guest may run from here on: keep the work after this short.
        if state is None:
            state = await self._settle(qemu)
        asked_to_run = self.options.paused is False
        note = describe_state(state, self.saved.run_state, asked_to_run=asked_to_run)
        if note is not None and not self.options.paused:
            notes = (*notes, note)
        notes = (*notes, *await self._set_clock(qemu.process.pid, state))
        if self.options.record is not None and recorder is None:
            notes = (*notes, "no working set is recorded: the memory is not mapped")
        ahead = self._read_ahead()
        if ahead.reason is not None:
            notes = (*notes, f"the recorded working set is not all read ahead: {ahead.reason}")
        report = RestoreReport(
            machine=self.source.snapshot.machine,
            qemu=".".join(map(str, qemu.monitor.version)),
            pid=qemu.process.pid,
            run_state=state,
            load_seconds=seconds,
            start_seconds=qemu.seconds,
            total_seconds=time.monotonic() - self.started_at,
            settings=incoming.settings(),
            lazy=None if keeper is None else keeper.state,
            recorded_pages=ahead.recorded_pages,
            prefetched_bytes=ahead.requested,
            notes=notes,
            **details,
        )
        view = self.source.pages_from.source.view
        view = view.share() if view is not None else None
        qemu.hand_over(bound=self.options.bound)
        return RestoredVm(qemu, report, recorder, view, keeper)

    async def _start_recording(self, qemu: QemuSession, mapped: Sequence[str]) -> Recorder | None:
        """Start to record which pages are touched, if that is asked for: before the load, since
        the guest may run as soon as it is loaded."""
        if self.options.record is None or self.source.place is None:
            return None
        if self.source.records_requests:
            return await self._record_requests(self.options.record)
        from pyqmigrate.vm.guest.changed_pages import RestoredBlock
        from pyqmigrate.vm.incoming.recording import WorkingSetRecorder

        recorder = WorkingSetRecorder(
            self.source.place, await asyncio.to_thread(self.source.identify), self.options.record
        )
        table = parse_ramblock(await qemu.monitor.hmp("info ramblock"))
        layouts = {layout.name: layout for layout in self.source.mapped.layouts}
        increment = self.source.increment
        recorder.start(
            qemu.process.pid,
            [
                RestoredBlock(
                    line.name,
                    line.host_address,
                    layouts[line.name].length,
                    layouts[line.name].pages_offset,
                    layouts[line.name].page_size,
                )
                for line in table
                if line.name in mapped
            ],
            known=None
            if increment is None
            else [increment.blocks[line.name].bitmap for line in table if line.name in mapped],
        )
        return recorder

    async def _record_requests(self, seconds: float) -> Recorder:
        """Start to record what is read of a snapshot of a store."""
        from pyqmigrate.vm.incoming.request_recording import RequestRecorder

        view = self.source.view
        assert view is not None
        place = await asyncio.to_thread(view.view.check_recordable)
        identity = await asyncio.to_thread(self.source.identify)
        recorder = RequestRecorder(view, place, identity, self.source.loaded.layouts, seconds)
        recorder.start()
        return recorder

    def _read_ahead(self) -> PrefetchState:
        """Return how far the prefetch of a recorded working set is."""
        prefetch = self.source.started_prefetch
        return PrefetchState() if prefetch is None else prefetch.state

    def _start_lookup(self) -> asyncio.Future[bool]:
        """Start to look for other guests of this snapshot: the kernel's answer takes longer than a
        restore should, so ask while QEMU starts."""
        lookup = asyncio.ensure_future(asyncio.to_thread(runs_already, self.source.mapped_fd))
        lookup.add_done_callback(lambda task: task.cancelled() or task.exception())
        return lookup

    async def _set_clock(self, pid: int, state: str) -> list[str]:
        if state != "running":
            return []
        if self.options.set_time:
            return await correct_clock(pid, self.options.guest_agent)
        return note_on_clock(self.source.age)

    async def _settle(self, qemu: QemuSession) -> str:
        """Wait for the run state, resume the guest if it shall run, and return the state.

        Raises QemuError if QEMU cannot resume it: it stays in ``inmigrate``, or refuses.
        """

        def before_it_runs() -> None:
            qemu.has_run = True

        try:
            return await settle(qemu.monitor, self._shall_run, before_it_runs)
        except LoadFailed as error:
            raise QemuError(await qemu.described(str(error))) from error

    def _shall_run(self, state: str) -> bool:
        return shall_resume(state, self.saved, self.options, self.source.was_running)
