"""A new QEMU that goes on where a snapshot was taken.

    guest = await restore("/snap/guest.mapped", ["qemu-system-x86_64", "-M", "q35", "-m", "4G"])
    print(guest.report.mode, guest.report.load_seconds)
    await guest.wait()

Three ways for the memory to get there:

- ``instant``: QEMU's RAM is a private mapping of the snapshot, and QEMU loads only a small
  companion stream. Time does not depend on the size of the guest.
- ``load``: QEMU reads all of the file before the guest runs.
- ``postcopy``: QEMU's own lazy load, where it has one.

QEMU compares neither the machine type nor the RAM blocks of a snapshot with its own as it should;
that is done here, before it loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import subprocess
import time
from collections.abc import Awaitable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import NotSupported, QemuError, QemuRefused
from pyqmigrate.io.target import DirectIO, Target
from pyqmigrate.qapi.monitor_address import monitor_path
from pyqmigrate.vm.cancellation import acquired
from pyqmigrate.vm.guest.clock import correct_clock, note_on_clock
from pyqmigrate.vm.incoming.companion import IncomingStream
from pyqmigrate.vm.incoming.companions import IncomingStreams
from pyqmigrate.vm.incoming.compatibility import compare_blocks, compare_devices, compare_type
from pyqmigrate.vm.incoming.early_start import EarlyRestore, StartedRestore, begin_mapped, prepare
from pyqmigrate.vm.incoming.identity import runs_already, shared_identity
from pyqmigrate.vm.incoming.inherited_fds import check_descriptors
from pyqmigrate.vm.incoming.load import Incoming, take_in
from pyqmigrate.vm.incoming.ram_files import RamFiles, loadable
from pyqmigrate.vm.incoming.ram_mapping import map_blocks
from pyqmigrate.vm.incoming.request import Disks, Mode, Request
from pyqmigrate.vm.incoming.restore_command import ChosenCommand, choose_command
from pyqmigrate.vm.incoming.run_state import RUNS, describe_state
from pyqmigrate.vm.incoming.saved_machine import SavedMachine, read_saved_machine
from pyqmigrate.vm.incoming.source import RestoreSource
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.exit import ProcessExit
from pyqmigrate.vm.qemu.launch import QemuSession, answered, launch
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.qemu.spawn import Stream

__all__ = [
    "Mode",
    "Request",
    "RestoreReport",
    "RestoredVm",
    "restore",
    "finish_restore",
    "restore_from",
]

# In what a QEMU says that does not start because its memory cannot be mapped from the snapshot.
# Patterns are strings, compiled when first used: a restore waits for each import.
_ABOUT_MEMORY = (
    r"backing (store|file)|backend file|memory[- ]backend|guest (RAM|memory)|mem-path|mmap|memdev"
)
_STATE_TIMEOUT = 5.0  # seconds from "completed" to the run state that the stream brought
_CAN_GO_ON = ("paused", "prelaunch", "io-error", "watchdog")


@dataclass(frozen=True)
class RestoreReport:
    """What a restore did, and why so. Times in seconds.

    ``load_seconds`` from ``migrate-incoming`` to completed, ``start_seconds`` until the new QEMU's
    monitor answered, ``total_seconds`` everything. ``settings`` are those of QEMU that differ from
    its defaults. ``stale_pages`` had to be marked because the file holds old bytes for zero pages;
    finding them took ``stale_seconds``, during the start. ``run_state`` is QEMU's (``running``,
    ``paused``, ``prelaunch``), ``notes`` what was changed in the command line and what to mind.
    """

    mode: Mode
    why: str
    machine: str
    qemu: str
    pid: int
    run_state: str
    load_seconds: float
    start_seconds: float
    total_seconds: float
    settings: dict[str, Any]
    mapped_blocks: tuple[str, ...] = ()
    stale_pages: int = 0
    stale_seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        settings = {name: {"value": value} for name, value in self.settings.items()}
        return asdict(self) | {"mode": str(self.mode), "settings": settings}


class RestoredVm:
    """A guest that goes on. ``process`` is its QEMU, ``monitor`` a session with it.

    Both are the caller's: as a context manager, or by :meth:`close`, only the session is ended,
    and QEMU goes on without it. Its process has to be waited for, as any child.
    """

    def __init__(self, qemu: QemuSession, report: RestoreReport) -> None:
        self._qemu = qemu
        self.report = report

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self._qemu.process

    @property
    def monitor(self) -> Monitor:
        return self._qemu.monitor

    async def wait(self) -> int:
        """Until QEMU ends; its exit status, negative for the signal that killed it."""
        if self.process.poll() is None:
            ending = ProcessExit(self.process.pid)
            try:
                await ending.wait()
            finally:
                ending.close()
        return self.process.wait()

    async def end(self) -> None:
        """End QEMU, whatever the guest does; by SIGTERM, at last SIGKILL, if it does not obey."""
        await self._qemu.end()

    async def close(self) -> None:
        """Hang up the monitor; the guest goes on. May be repeated."""
        await self.monitor.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def restore(
    snapshot: Target,
    command: Sequence[str] | None = None,
    *,
    mode: Mode | str = Mode.AUTO,
    paused: bool | None = None,
    qmp: str | os.PathLike[str] | None = None,
    offset: int | None = None,
    channels: int | None = None,
    direct_io: DirectIO | str = DirectIO.AUTO,
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
    pass_fds: Collection[int] = (),
    with_disks: bool = False,
    disks_dir: str | os.PathLike[str] | None = None,
    disks_as_they_are: bool = False,
    set_time: bool = False,
    guest_agent: str | os.PathLike[str] | None = None,
) -> RestoredVm:
    """Start a QEMU and have it go on where ``snapshot`` was taken.

    command: the command line that the VM was started with, the program first. What a restore
        needs is added; what cannot go with it is left out and named in the report's notes, or
        refused. None is the one that ``vm save`` recorded (:mod:`pyqmigrate.vm.record.contents`); a
        given one is compared with that record, where there is one. A fixed number of ``vmgenid``
        becomes a new one.
    mode: see :class:`Mode`.
    paused: True leaves the guest paused, False lets it run, None does as ``-S`` or else the
        snapshot says.
    qmp: the path of a monitor socket to add, or unix:PATH.
    offset: where in the file the stream starts, bytes; None is at its start, or behind the header
        of an image that libvirt saved.
    channels, direct_io: how QEMU reads the file in mode ``load``; the default is chosen by
        whether the file is in the page cache.
    stdin, stdout, stderr: QEMU's, as for subprocess.Popen; None is this process's own. Standard
        error is passed on from the moment the guest is there, by a thread of this process; what
        QEMU writes after this process has ended is lost.
    pass_fds: descriptors that the command line names by their numbers, and QEMU is to have.
    with_disks: give the guest new overlays over the disks as they were at the snapshot's instant,
        in the directory ``disks_dir`` (None: beside the snapshot). They are removed where the
        restore fails, and stay with the guest otherwise: the report's notes name them.
    disks_as_they_are: restore also where the disks have gone ahead of the snapshot, or are others
        than the record has. The guest's file systems are then at its own risk.
    set_time: set the guest's clock by its agent, once it runs. Where that fails, or takes more than
        five seconds, a note says so.
    guest_agent: the path of the agent's socket; None finds it in the command line.

    Raises UsageError for a command line that contradicts a restore, for another machine type, fewer
    processors or missing devices, and for sockets and disks that another process uses,
    BlockMismatch for other RAM blocks, SnapshotError for a bad file, NotSupported where this QEMU
    or this file cannot do ``mode``, QemuError with QEMU's own output when it does not start or
    load. Whatever fails, the QEMU that was started is ended.
    """
    request = Request(
        parse_enum(Mode, mode, "mode"),
        paused,
        None if qmp is None else monitor_path(qmp),
        channels,
        parse_enum(DirectIO, direct_io, "direct_io"),
        stdin,
        stdout,
        stderr,
        check_descriptors(pass_fds),
        Disks(with_disks, None if disks_dir is None else Path(disks_dir), disks_as_they_are),
        set_time,
        guest_agent,
    )
    companions = await IncomingStreams.open(snapshot, offset)
    return await _closing(companions, _restore(companions, command, request))


async def _restore(
    companions: IncomingStreams, words: Sequence[str] | None, request: Request
) -> RestoredVm:
    choosing = asyncio.to_thread(choose_command, companions.source, words, request.disks)
    chosen = await acquired(choosing, ChosenCommand.discard)
    return await restore_from(companions, chosen, request)


async def finish_restore(early: EarlyRestore) -> RestoredVm:
    """The rest of a restore that :func:`pyqmigrate.vm.incoming.early_start.begin` has begun; it is
    ended, whatever goes wrong."""
    begun = early.begun
    companions = IncomingStreams(begun.source)
    attempt = _Attempt(companions, early.request, begun.started.started_at, early.notes)
    with _discarding(early.chosen):
        return await _closing(companions, attempt.instant_or_load(begun, early.command))


async def _closing(companions: IncomingStreams, work: Awaitable[RestoredVm]) -> RestoredVm:
    """The result of ``work``, and the companions closed. A cancellation meanwhile ends its QEMU,
    which the caller would not know of."""
    vm: RestoredVm | None = None
    try:
        async with companions:
            vm = await work
    except BaseException:
        if vm is not None:
            await vm.end()
        raise
    return vm


@contextlib.contextmanager
def _discarding(chosen: ChosenCommand) -> Iterator[None]:
    """Without the overlays that were made for it, when no guest has come of it."""
    try:
        yield
    except BaseException:
        chosen.discard()
        raise


async def restore_from(
    companions: IncomingStreams, chosen: ChosenCommand, request: Request
) -> RestoredVm:
    """As :func:`restore`, from a snapshot that is open."""
    with _discarding(chosen):
        return await _restore_from(companions, chosen, request)


async def _restore_from(
    companions: IncomingStreams, chosen: ChosenCommand, request: Request
) -> RestoredVm:
    started = time.monotonic()
    command, request, notes = prepare(chosen.command, request, companions.source.snapshot)
    attempt = _Attempt(companions, request, started, (*chosen.notes, *notes))
    if request.mode not in (Mode.AUTO, Mode.INSTANT):
        return await attempt.load(command, "asked for")
    source = companions.source
    try:
        mapped = map_blocks(command, source.snapshot, source.fd)
    except NotSupported as error:
        if request.mode is Mode.INSTANT:
            raise NotSupported(f"no instant restore: {error}") from error
        return await attempt.load(command, f"no instant restore: {error}")
    begun = await acquired(
        asyncio.to_thread(begin_mapped, source, mapped, request), StartedRestore.end
    )
    return await attempt.instant_or_load(begun, command)


class _NotStarted(QemuError):
    """QEMU ended before its monitor answered."""


def _about(companion: IncomingStream) -> tuple[str, ...]:
    if not companion.sealed:
        return ()
    return ("the snapshot is sealed: its clear pages are zeros in the file and were not searched",)


async def _taken_in(qemu: QemuSession, incoming: Incoming, differences: Sequence[str]) -> float:
    """As take_in; an error has the ``differences``, which QEMU may not have got over, with it."""
    try:
        return await take_in(qemu, incoming)
    except QemuError as error:
        if not differences or isinstance(error, QemuRefused):
            raise
        told = "\n".join(f"perhaps because {note}" for note in differences)
        raise type(error)(f"{error}\n{told}") from error


@dataclass(frozen=True)
class _Attempt:
    companions: IncomingStreams
    request: Request
    started: float
    notes: tuple[str, ...] = field(default=())

    @property
    def source(self) -> RestoreSource:
        return self.companions.source

    async def instant_or_load(self, begun: StartedRestore, command: CommandLine) -> RestoredVm:
        """``command`` is that of a load, should the QEMU that was begun not start."""
        try:
            return await self._instant(begun)
        except _NotStarted as error:
            if self.request.mode is Mode.INSTANT or not re.search(_ABOUT_MEMORY, str(error)):
                raise
            first = f"no instant restore: with mapped memory, {error}"
            try:
                return await self.load(command, first)
            except QemuError as second:
                raise QemuError(f"{second}\n{first}") from second

    async def _instant(self, begun: StartedRestore) -> RestoredVm:
        mapped, files = begun.mapped, begun.files
        building = asyncio.ensure_future(self.companions.get(mapped.blocks))
        # Where QEMU does not start either, nobody asks what became of it.
        building.add_done_callback(lambda task: task.cancelled() or task.exception())
        others = self._ask_for_others()
        try:
            async with await self._answering(answered(begun.started)) as qemu:
                compared = await self._compare(qemu, mapped.command)
                companion = await building
                await asyncio.to_thread(files.clear)
                fd = companion.open_for_reading()
                try:
                    incoming = Incoming({"companion": fd}, self.source.snapshot.offset)
                    seconds = await _taken_in(qemu, incoming, compared)
                finally:
                    os.close(fd)
                return await self._hand_over(
                    qemu,
                    mapped.command,
                    others,
                    seconds,
                    incoming,
                    mode=Mode.INSTANT,
                    why="the memory is mapped from the snapshot",
                    mapped_blocks=tuple(mapped.blocks),
                    stale_pages=companion.stale_pages,
                    stale_seconds=companion.stale_seconds,
                    notes=(*self.notes, *compared, *mapped.notes, *files.notes, *_about(companion)),
                )
        finally:
            building.cancel()
            files.close()

    async def load(self, command: CommandLine, why: str) -> RestoredVm:
        request = self.request
        if request.mode is Mode.POSTCOPY:
            return await self._load(command, why, Mode.POSTCOPY, {}, 0)
        reading = await acquired(
            asyncio.to_thread(self.source.reading, request.channels, request.direct_io),
            self.source.close_reading,
        )
        try:
            direct = {"direct": reading.direct.fd} if reading.direct else {}
            notes = f"reading: {reading.why}"
            return await self._load(command, why, Mode.LOAD, direct, reading.channels, notes)
        finally:
            self.source.close_reading(reading)

    async def _load(
        self,
        command: CommandLine,
        why: str,
        mode: Mode,
        direct: dict[str, int],
        channels: int,
        *notes: str,
    ) -> RestoredVm:
        command, changes = loadable(command, self.source.snapshot)
        with await self._files(command) as files:
            request = self.request
            others = self._ask_for_others()
            launching = launch(
                command,
                request.pass_fds,
                qmp=request.qmp,
                stdin=request.stdin,
                stdout=request.stdout,
                stderr=request.stderr,
            )
            async with await self._answering(launching) as qemu:
                compared = await self._compare(qemu, command)
                await asyncio.to_thread(files.clear)
                fd = self.source.open_again()
                try:
                    incoming = Incoming(
                        {"buffered": fd, **direct},
                        self.source.snapshot.offset,
                        self.source.capabilities,
                        channels,
                        bool(direct),
                        mode is Mode.POSTCOPY,
                    )
                    seconds = await _taken_in(qemu, incoming, compared)
                finally:
                    os.close(fd)
                return await self._hand_over(
                    qemu,
                    command,
                    others,
                    seconds,
                    incoming,
                    mode=mode,
                    why=why,
                    notes=(*self.notes, *compared, *changes, *files.notes, *notes),
                )

    async def _files(self, command: CommandLine) -> RamFiles:
        """The memory files of a QEMU to come; refused before it starts."""
        return await acquired(
            asyncio.to_thread(RamFiles, command, self.source.snapshot), RamFiles.close
        )

    async def _answering(self, answering: Awaitable[QemuSession]) -> QemuSession:
        """A QEMU, once it answers."""
        try:
            return await answering
        except QemuError as error:
            raise _NotStarted(str(error)) from error

    async def _compare(self, qemu: QemuSession, command: CommandLine) -> list[str]:
        """Hold a QEMU against the snapshot, and have its guest wait when that is loaded: whatever
        happens until then, the guest has not run. Returns notes."""
        await compare_type(qemu.monitor, self.source.snapshot)
        notes = await compare_devices(qemu.monitor, command, self.saved)
        await compare_blocks(qemu.monitor, self.source.snapshot)
        if self._starts_here:
            await qemu.monitor.execute("stop")
        else:
            qemu.has_run = True
        return notes

    @property
    def _starts_here(self) -> bool:
        """Whether the guest is let run by us, and not by QEMU as soon as it has loaded."""
        if self.request.mode is Mode.POSTCOPY:
            return False
        return self.request.paused is not None or self.saved.run_state is not None

    @functools.cached_property
    def saved(self) -> SavedMachine:
        return read_saved_machine(self.source.snapshot)

    async def _hand_over(
        self,
        qemu: QemuSession,
        command: CommandLine,
        others: asyncio.Future[bool],
        seconds: float,
        incoming: Incoming,
        *,
        notes: tuple[str, ...],
        **what: Any,
    ) -> RestoredVm:
        shared = shared_identity(command) if await others else None
        if shared is not None and shared not in notes:
            notes = (*notes, shared)
        # From here on the guest may run: what can be done before is done.
        state = await self._settle(qemu)
        asked_to_run = self.request.paused is False
        explained = describe_state(state, self.saved.run_state, asked_to_run=asked_to_run)
        if explained is not None and not self.request.paused:
            notes = (*notes, explained)
        notes = (*notes, *await self._clock(qemu.process.pid, state))
        report = RestoreReport(
            machine=self.source.snapshot.machine,
            qemu=".".join(map(str, qemu.monitor.version)),
            pid=qemu.process.pid,
            run_state=state,
            load_seconds=seconds,
            start_seconds=qemu.seconds,
            total_seconds=time.monotonic() - self.started,
            settings=incoming.settings(),
            notes=notes,
            **what,
        )
        qemu.hand_over()
        return RestoredVm(qemu, report)

    def _ask_for_others(self) -> asyncio.Future[bool]:
        """Begin to ask whether another guest goes on from this snapshot: the kernel's answer takes
        longer than a restore should, and QEMU starts in that time."""
        asking = asyncio.ensure_future(asyncio.to_thread(runs_already, self.source.fd))
        asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        return asking

    async def _clock(self, pid: int, state: str) -> list[str]:
        if state != "running":
            return []
        if self.request.set_time:
            return await correct_clock(pid, self.request.guest_agent)
        return note_on_clock(self.source.age)

    async def _settle(self, qemu: QemuSession) -> str:
        """The run state once it has come, after ``cont`` where the guest is to run.

        Raises QemuError when QEMU cannot let it go on: it hangs in ``inmigrate`` then, or refuses.
        """
        deadline = time.monotonic() + _STATE_TIMEOUT
        while (state := await _run_state(qemu.monitor)) == "inmigrate":
            if time.monotonic() > deadline:
                raise QemuError(
                    await qemu.described(
                        "QEMU loaded the snapshot and the guest cannot go on: it stays in 'inmigrate'"
                    )
                )
            await asyncio.sleep(0.001)
        if not self._is_to_run(state):
            return state
        qemu.has_run = True
        try:
            await qemu.monitor.execute("cont")
        except QemuRefused as error:
            raise QemuError(
                await qemu.described(
                    f"QEMU loaded the snapshot and the guest cannot go on: {error.desc}"
                )
            ) from error
        return await _run_state(qemu.monitor)

    def _is_to_run(self, state: str) -> bool:
        if self.request.paused is not None:
            return not self.request.paused and state in _CAN_GO_ON
        was_running = self.source.was_running or self.saved.run_state in RUNS
        return was_running and state in ("paused", "prelaunch")


async def _run_state(monitor: Monitor) -> str:
    return str((await monitor.execute("query-status"))["status"])
