"""The state machine: one guest, its outgoing migrations, and at most one incoming."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.errors import (
    Cancelled,
    JobTimeout,
    PyqmigrateError,
    SnapshotTruncated,
    TargetError,
    UsageError,
)
from pyqmigrate.format.device.sections import encode_devices, global_state, run_state_of
from pyqmigrate.io.memory import RamBlock, attach, check_blocks
from pyqmigrate.io.threads import start_thread
from pyqmigrate.log import logger
from pyqmigrate.migration import rules
from pyqmigrate.migration.fdset import FdSets, is_fdset_name
from pyqmigrate.migration.fdset_checks import Direction, check_fdset
from pyqmigrate.migration.guest import Guest
from pyqmigrate.migration.incoming import Source
from pyqmigrate.migration.outgoing import Clock, in_file, open_writer, selections
from pyqmigrate.migration.target import TakeFd, opens_late
from pyqmigrate.qapi.address import Address, Transport, parse_uri
from pyqmigrate.qapi.capabilities import Capabilities
from pyqmigrate.qapi.event import Event
from pyqmigrate.qapi.parameters import MigrationMode, Parameters
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qapi.status import MigrationInfo, RamStatistics, RunState, Status
from pyqmigrate.snapshot.save.writer import StreamWriter

__all__ = ["Migration"]

_MOST_PASSES = 30
_EXECUTING = {RunState.RUNNING}


def _no_named_fd(name: str) -> int:
    raise UsageError(f"File descriptor named '{name}' has not been found")


class OpenError(PyqmigrateError, OSError):
    """The target or source of a migration cannot be opened; the text is QEMU's."""

    def __str__(self) -> str:
        return str(self.strerror)


def _open_error(verb: str, address: Address, error: Exception) -> Exception:
    """A system's refusal of a path in QEMU's words; any other error as it is."""
    if not isinstance(error, TargetError) or error.errno is None:
        return error
    return OpenError(error.errno, f"Could not {verb} '{address.path}': {os.strerror(error.errno)}")


class _SwitchoverInterrupted(Cancelled):
    """Cancelled while the guest waited in ``pre-switchover``."""


class Migration:
    """A guest's migrations to and from files.

    blocks: the guest's RAM. ``guest`` says how it is stopped, what changed, and what its devices
        hold; the default is memory that never changes.
    fdsets: where ``/dev/fdset/N`` is looked up; a program that has none may leave it out.
    machine, target_page_bits: for the stream, as in :func:`pyqmigrate.save`.
    uuid: the guest's, told and compared while the capability ``validate-uuid`` is on.
    policy: STRICT refuses before the start what QEMU fails or dies on later; the others do what
        a QEMU of that version does, and fail where it would crash.
    run_state: what the guest does now. With ``incoming`` it waits in ``inmigrate`` for
        :meth:`migrate_incoming`, and then runs if the stream says so and ``autostart`` is true.
    capabilities, parameters: those to begin with. Bandwidth is unlimited unless they say
        otherwise.
    on_exit: called when an incoming migration fails that was begun with ``exit_on_error``.

    All methods may be called from any thread. One thread works while a migration is under way.
    """

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        *,
        guest: Guest | None = None,
        fdsets: FdSets | None = None,
        machine: str = "",
        target_page_bits: int | None = None,
        uuid: UUID | None = None,
        policy: Policy = Policy.STRICT,
        run_state: RunState = RunState.RUNNING,
        incoming: bool = False,
        autostart: bool = True,
        capabilities: Capabilities | None = None,
        parameters: Parameters | None = None,
        on_exit: Callable[[], None] | None = None,
    ) -> None:
        check_blocks(blocks)
        check("guest", guest, Guest, type(None))
        check("fdsets", fdsets, FdSets, type(None))
        check("machine", machine, str)
        check("target_page_bits", target_page_bits, int, type(None))
        check("uuid", uuid, UUID, type(None))
        check("incoming", incoming, bool)
        check("autostart", autostart, bool)
        check("capabilities", capabilities, Capabilities, type(None))
        check("parameters", parameters, Parameters, type(None))
        check_callback("on_exit", on_exit)
        check("policy", policy, Policy)
        check("run_state", run_state, RunState)
        self._blocks = tuple(blocks)
        self._pages = [_pages(block) for block in self._blocks]
        self._guest = guest or Guest()
        self._fdsets = fdsets or FdSets()
        self._machine = machine
        self._target_page_bits = target_page_bits
        self._uuid = uuid
        self._policy = policy
        self._capabilities = capabilities or Capabilities()
        self._parameters = parameters or Parameters(max_bandwidth=0)
        self.on_exit = on_exit
        self._deferred = incoming
        self._autostart = autostart
        self._run_state = RunState.INMIGRATE if incoming else run_state

        # Nobody holds _lock while something may take long: an event loop asks under it. The other
        # two are taken before it, never inside.
        self._starting = threading.Lock()
        self._guest_lock = threading.RLock()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._subscribers: list[Callable[[Event], None]] = []
        self._status = Status.NONE
        self._incoming_status = Status.NONE
        self._incoming_started = False
        self._error = ""
        self._info = MigrationInfo()
        self._writer: StreamWriter | None = None
        self._clock = Clock()
        self._passes = 0
        self._pass_base = 0
        self._committing = False
        self._stopped_here = False
        self._thread: threading.Thread | None = None

    # ---- what is asked ----------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def parameters(self) -> Parameters:
        return self._parameters

    @property
    def run_state(self) -> RunState:
        return self._run_state

    @property
    def uuid(self) -> UUID | None:
        return self._uuid

    @property
    def fdsets(self) -> FdSets:
        return self._fdsets

    @property
    def policy(self) -> Policy:
        return self._policy

    def memory_size(self) -> int:
        """The guest's RAM in bytes."""
        return sum(
            pages * block.page_size for pages, block in zip(self._pages, self._blocks, strict=True)
        )

    def query(self) -> MigrationInfo:
        """Where the outgoing migration stands, or the incoming one of a guest that waits for it."""
        status = self._status
        if self._deferred and status is Status.NONE:
            return MigrationInfo(self._incoming_status, self._error)
        if not status.running:
            return self._info
        return MigrationInfo(
            status,
            self._error,
            self._statistics(),
            self._clock.running(),
            self._clock.setup,
            0,
            self._parameters.downtime_limit,
        )

    def wait(self, timeout: float | None = None) -> MigrationInfo:
        """Wait until no migration is under way, and return where it ended.

        Raises JobTimeout after ``timeout`` seconds; the migration goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._thread is None, timeout):
                raise JobTimeout(f"the migration has not ended after {timeout} s; it goes on")
        return self.query()

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``callback`` for every event from now on; the function returned ends that.

        It is called in the order of the events, on whatever thread they happen, and must not
        block. MIGRATION and MIGRATION_PASS come only while the capability ``events`` is on.
        """
        with self._lock:
            self._subscribers.append(callback)

        def end() -> None:
            with self._lock, contextlib.suppress(ValueError):
                self._subscribers.remove(callback)

        return end

    # ---- what is set ------------------------------------------------------------------------

    def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        """Merge changes over the capabilities, all or nothing; UsageError with QEMU's text."""
        with self._lock:
            if self._status.running:
                raise UsageError("There's a migration process in progress")
            self._capabilities = self._capabilities.merge(
                changes, compressed_or_tls=self._parameters.compressed_or_tls, policy=self._policy
            )

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        """Merge changes over the parameters, all or nothing; UsageError with QEMU's text.

        ``max-bandwidth`` has effect at once, also on a migration under way.
        """
        with self._lock:
            self._parameters = self._parameters.merge(
                changes,
                capabilities=self._capabilities,
                policy=self._policy,
                running=self._status.running,
            )
            if self._writer is not None:
                self._writer.channels.set_rate(self._parameters.max_bandwidth)

    # ---- outgoing ---------------------------------------------------------------------------

    def migrate(
        self, address: Address | str, *, resume: bool = False, take_fd: TakeFd = _no_named_fd
    ) -> None:
        """Begin an outgoing migration to an address or URI; returns when its target is open.

        Raises UsageError or FdsetError from a check, and then nothing has changed; FdsetError,
        TargetError or UsageError from the open, TargetError where no thread can be started, and
        then the status is ``failed``. With COMPAT
        it becomes ``failed`` without an error raised where only a descriptor with O_DIRECT is
        missing or refused: QEMU opens that after its answer (and 10.0 dies of it).
        """
        address = parse_uri(address) if isinstance(address, str) else address
        with self._starting:
            with self._lock:
                rules.check_outgoing(
                    address.transport,
                    self._capabilities,
                    self._parameters,
                    status=self._status,
                    run_state=self._run_state,
                    resume=resume,
                )
                self._check_strictly(address, Direction.SAVE)
                self._error = ""
                self._clock = Clock()
                self._passes = self._pass_base = 0
                self._committing = self._stopped_here = False
                self._set_status(Status.SETUP)
            resources = contextlib.ExitStack()
            try:
                writer = self._open(address, take_fd, resources)
            except (PyqmigrateError, OSError) as error:
                resources.close()
                named = _open_error("create", address, error)
                if self._policy.compat and opens_late(error):
                    with self._lock, contextlib.suppress(TargetError):
                        self._start(lambda: self._end_failed(named), "pyqmigrate-migrate")
                        return
                self._end_failed(named)
                raise named from error
            with self._lock:
                self._writer = writer
                writer.channels.set_rate(self._parameters.max_bandwidth)
                if self._cancelling():  # it came while the target was opened
                    writer.channels.cancel()
                try:
                    self._start(lambda: self._run_outgoing(resources), "pyqmigrate-migrate")
                except TargetError as error:
                    resources.close()
                    self._end_outgoing(Status.FAILED, error)
                    raise

    def _open(
        self, address: Address, take_fd: TakeFd, resources: contextlib.ExitStack
    ) -> StreamWriter:
        writer = open_writer(
            address,
            self._blocks,
            self._capabilities,
            self._parameters,
            policy=self._policy,
            fdsets=self._fdsets,
            take_fd=take_fd,
            machine=self._machine,
            target_page_bits=self._target_page_bits,
            uuid=self._uuid,
            resources=resources,
        )
        resources.callback(writer.close)
        return writer

    def _check_strictly(self, address: Address, direction: Direction) -> None:
        if self._policy is not Policy.STRICT:
            return
        rules.check_strictly(self._capabilities)
        if address.transport is Transport.FILE and is_fdset_name(address.path):
            check_fdset(
                self._fdsets,
                address.path,
                direction,
                direct_io=rules.effective_direct_io(self._capabilities, self._parameters),
                offset=address.offset,
            )

    def cancel(self) -> None:
        """Cancel the outgoing migration; returns at once, and does nothing when none runs.

        One that is being made durable already is completed instead.
        """
        with self._changed:
            ending = self._committing or self._status is Status.FAILING
            if ending or not self._status.running:
                return
            if self._status is not Status.CANCELLING:
                self._set_status(Status.CANCELLING)
            if self._writer is not None:
                self._writer.channels.cancel()
            self._changed.notify_all()

    def migrate_continue(self, state: str) -> None:
        """Go on from ``pre-switchover``; UsageError in any other state than ``state``."""
        with self._changed:
            if self._status != state or self._status is not Status.PRE_SWITCHOVER:
                raise UsageError(f"Migration not in expected state: {self._status}")
            self._set_status(Status.DEVICE)
            self._changed.notify_all()

    def _run_outgoing(self, resources: contextlib.ExitStack) -> None:
        writer = self._writer
        assert writer is not None
        before = self._run_state
        try:
            with resources:
                self._save(writer, before)
        except Cancelled as error:
            self._let_go_on(before)
            told = not self._cancelling() or (
                self._policy.compat and isinstance(error, _SwitchoverInterrupted)
            )
            self._end_outgoing(Status.CANCELLED, error if told else None)
        except BaseException as error:
            logger.info("outgoing migration failed: %s", error)
            ended = Status.CANCELLED if self._cancelling() else Status.FAILED
            if ended is Status.FAILED:
                self._begin_failing()
            self._let_go_on(before)
            if self._policy.compat and isinstance(error, TargetError) and error.errno:
                error = OpenError(
                    error.errno, f"Unable to write to file: {os.strerror(error.errno)}"
                )
            self._end_outgoing(ended, None if self._cancelling() else error)
        else:
            self._end_outgoing(Status.COMPLETED, None)

    def _save(self, writer: StreamWriter, before: RunState) -> None:
        self._clock.set_up()
        if self._parameters.mode is MigrationMode.CPR_REBOOT and before in _EXECUTING:
            self._stop_for_switchover()
        self._begin_pass(told=self._policy.qemu.first_pass_event)
        self._go_to(Status.ACTIVE)
        writer.begin()
        tracked = self._run_state in _EXECUTING and self._guest.dirty() is not None
        if self._run_state in _EXECUTING and not tracked:
            self._stop_for_switchover()
        writer.write_pages()
        if tracked:
            self._repeat(writer)
        if not self._policy.qemu.first_pass_event:
            self._begin_pass()
        if tracked:
            self._stop_for_switchover()
        if self._capabilities.pause_before_switchover:
            self._pause(writer)
        else:
            self._go_to(Status.DEVICE)
        if self._policy.qemu.first_pass_event:
            self._begin_pass()
        if tracked:
            dirty = self._guest.dirty()
            if dirty is not None:
                self._write_dirty(writer, dirty, last=True)
            writer.clean()
        ignoring = self._capabilities.x_ignore_shared and self._capabilities.mapped_ram
        fails = self._policy.compat and not self._policy.qemu.external_blocks
        if fails and ignoring and any(map(in_file, self._blocks)):
            raise OpenError(errno.EFAULT, "Unable to write to file: Bad address")
        sections, description = encode_devices(
            [global_state(before), *self._guest.save_devices()], self._blocks[0].page_size
        )
        with self._lock:
            if self._cancelling():
                raise Cancelled("cancelled")
            self._committing = True
        writer.finish(sections, description)

    def _repeat(self, writer: StreamWriter) -> None:
        """Passes over what changed meanwhile, until that is little enough for the downtime."""
        limit = self._parameters.downtime_limit / 1000
        for _ in range(_MOST_PASSES):
            dirty = self._guest.dirty() or {}
            started, moved = time.monotonic(), writer.channels.totals().bytes_moved
            changed = self._write_dirty(writer, dirty)
            seconds = time.monotonic() - started
            written = writer.channels.totals().bytes_moved - moved
            if changed == 0 or seconds <= limit:
                return
            logger.debug("pass %d: %d bytes in %.3f s", self._passes, written, seconds)

    def _write_dirty(
        self, writer: StreamWriter, dirty: Mapping[str, object], *, last: bool = False
    ) -> int:
        chosen = selections(dirty, self._blocks, self._pages)
        try:
            changed = sum(bitmap.count() for bitmap in chosen)
            if changed:
                if not last:  # that one has been told
                    self._begin_pass()
                writer.write_pages(chosen)
            return changed
        finally:
            for bitmap in chosen:
                bitmap.close()

    def _begin_pass(self, *, told: bool = True) -> None:
        with self._lock:
            self._passes += 1
            if self._writer is not None:
                self._pass_base = self._writer.channels.totals().bytes_done
            if told:
                self._emit("MIGRATION_PASS", {"pass": self._passes})

    def _stop_for_switchover(self) -> None:
        with self._guest_lock:
            if self._run_state not in _EXECUTING:
                return
            self._clock.stopped()
            self._guest.stop()
            self._stopped_here = True
            self._set_run_state(RunState.FINISH_MIGRATE, "STOP")

    def _pause(self, writer: StreamWriter) -> None:
        with self._changed:
            self._go_to(Status.PRE_SWITCHOVER)
            self._changed.wait_for(lambda: self._status is not Status.PRE_SWITCHOVER)
        if self._cancelling():
            raise _SwitchoverInterrupted(self._policy.qemu.interrupted_switchover)

    def _let_go_on(self, before: RunState) -> None:
        """After a failure or a cancel: the guest is what it was."""
        with self._guest_lock:
            if self._stopped_here:
                self._stopped_here = False
                try:
                    self._guest.cont()
                except Exception:
                    logger.exception("the guest could not be continued")
                self._set_run_state(before, "RESUME")

    def _cancelling(self) -> bool:
        return self._status is Status.CANCELLING

    def _go_to(self, status: Status) -> None:
        with self._lock:
            if self._cancelling():
                raise Cancelled("cancelled")
            self._set_status(status)

    def _begin_failing(self) -> None:
        """What comes between an error and ``failed``, where the QEMU that is imitated has it."""
        if self._policy.qemu.has(Status.FAILING):
            with self._lock:
                self._set_status(Status.FAILING)

    def _end_outgoing(self, status: Status, error: BaseException | None) -> None:
        with self._changed:
            self._clock.ended()
            statistics = self._statistics() if self._writer is not None else None
            self._error = str(error) if error is not None else ""
            if status is Status.COMPLETED:
                self._run_state = RunState.POSTMIGRATE
            self._info = MigrationInfo(
                status,
                self._error,
                statistics,
                self._clock.total,
                self._clock.setup,
                self._clock.downtime,
                0,
            )
            self._writer = None
            self._thread = None
            self._set_status(status)
            self._changed.notify_all()

    def _end_failed(self, error: BaseException) -> None:
        self._begin_failing()
        self._end_outgoing(Status.FAILED, error)

    def _statistics(self) -> RamStatistics:
        writer = self._writer
        if writer is None:
            return RamStatistics()
        totals = writer.channels.totals()
        page_size = self._blocks[0].page_size
        seconds = max(self._clock.running(), 1) / 1000
        done = totals.bytes_done - self._pass_base
        finished = self._committing
        return RamStatistics(
            total=writer.total,
            remaining=0 if finished else max(0, writer.total - done),
            transferred=totals.bytes_moved,
            duplicate=totals.zero_pages,
            normal=totals.data_pages,
            normal_bytes=totals.data_pages * page_size,
            page_size=page_size,
            mbps=totals.bytes_moved * 8 / 1e6 / seconds,
            dirty_sync_count=self._passes,
            multifd_bytes=totals.bytes_moved if self._capabilities.multifd else 0,
            pages_per_second=round(totals.data_pages / seconds) if not finished else 0,
        )

    # ---- incoming ---------------------------------------------------------------------------

    def check_incoming_allowed(self) -> None:
        """Raise UsageError unless the guest waits for a migration and none was accepted yet."""
        rules.check_incoming(deferred=self._deferred, started=self._incoming_started)

    def migrate_incoming(
        self, address: Address | str, *, exit_on_error: bool = True, take_fd: TakeFd = _no_named_fd
    ) -> None:
        """Begin to load from an address or URI; returns when the source is open.

        Raises UsageError or FdsetError from a check, and then nothing has changed; FdsetError,
        TargetError or UsageError from the open: the status goes back to ``none`` and it may be
        tried again, except with COMPAT, where it stays ``setup`` as QEMU's does.
        """
        address = parse_uri(address) if isinstance(address, str) else address
        with self._starting:
            with self._lock:
                self.check_incoming_allowed()
                rules.check_incoming_transport(
                    address.transport,
                    self._capabilities,
                    self._parameters,
                    status=self._incoming_status,
                )
                self._check_strictly(address, Direction.LOAD)
                self._set_incoming(Status.SETUP)
            try:
                source = Source(
                    address,
                    self._capabilities,
                    self._parameters,
                    policy=self._policy,
                    fdsets=self._fdsets,
                    take_fd=take_fd,
                    uuid=self._uuid,
                )
            except (PyqmigrateError, OSError) as error:
                if self._policy is Policy.STRICT:
                    self._incoming_status = Status.NONE
                raise _open_error("open", address, error) from error
            with self._lock:
                self._incoming_started = True
                try:
                    self._start(
                        lambda: self._run_incoming(source, exit_on_error), "pyqmigrate-incoming"
                    )
                except TargetError:
                    source.close()
                    self._incoming_started = False
                    self._incoming_status = Status.NONE
                    raise

    def _run_incoming(self, source: Source, exit_on_error: bool) -> None:
        try:
            self._set_incoming(Status.ACTIVE)
            with contextlib.closing(source):
                devices, report = source.load(self._blocks)
            logger.debug("incoming migration: %s", report)
            self._guest.load_devices(devices)
            self._start_loaded(run_state_of(devices))
        except BaseException as error:
            logger.info("incoming migration failed: %s", error)
            with self._changed:
                reason = str(error)
                if self._policy.compat:  # QEMU 10.0 has the reason on its standard error
                    number = os.strerror(self._loading_errno(error))
                    reason = f"{number}: {reason}" if self._policy.qemu.load_reasons else number
                self._error = f"load of migration failed: {reason}"
                self._thread = None
                self._set_incoming(Status.FAILED)
                self._changed.notify_all()
            if exit_on_error and self.on_exit is not None:
                self.on_exit()

    def _loading_errno(self, error: BaseException) -> int:
        """What QEMU makes of a failed load."""
        if isinstance(error, SnapshotTruncated) and not self._capabilities.mapped_ram:
            return errno.EIO
        return getattr(error, "errno", None) or errno.EINVAL

    def _start_loaded(self, stored: str | None) -> None:
        run_state = RunState.RUNNING
        if stored is not None and stored in set(RunState):
            run_state = RunState(stored)
        with self._guest_lock:
            if run_state is RunState.RUNNING and self._autostart:
                self._guest.cont()
                self._set_run_state(run_state, "RESUME")
            elif run_state is RunState.RUNNING:
                self._set_run_state(RunState.PAUSED)
            else:
                self._set_run_state(run_state)
        with self._changed:
            self._thread = None
            self._set_incoming(Status.COMPLETED)
            self._changed.notify_all()

    # ---- the guest --------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop the guest (event STOP); one that is stopped already, or waits, stays so."""
        with self._guest_lock:
            if self._run_state is RunState.INMIGRATE:
                self._autostart = False
            if self._run_state in _EXECUTING:
                self._guest.stop()
                self._set_run_state(RunState.PAUSED, "STOP")

    def cont(self) -> None:
        """Run the guest (event RESUME), also from ``postmigrate``.

        While it waits for a migration, only note that it is to run afterwards; while the last
        pages of one are saved, do nothing.
        """
        with self._guest_lock:
            if self._run_state is RunState.INMIGRATE:
                self._autostart = True
            elif self._run_state not in (*_EXECUTING, RunState.FINISH_MIGRATE):
                self._guest.cont()
                self._set_run_state(RunState.RUNNING, "RESUME")

    def close(self) -> None:
        """Cancel what runs, wait for its end, and close the fdsets. May be repeated."""
        self.cancel()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._fdsets.close()

    # ---- shared -----------------------------------------------------------------------------

    def _start(self, work: Callable[[], None], name: str) -> None:
        """Raises TargetError where no thread can be started; nothing has changed then."""
        thread = threading.Thread(target=work, name=name)
        start_thread(thread)
        self._thread = thread

    def _set_run_state(self, run_state: RunState, event: str | None = None) -> None:
        with self._lock:
            self._run_state = run_state
            if event is not None:
                self._emit(event)

    def _set_status(self, status: Status) -> None:
        self._status = status
        self._emit("MIGRATION", {"status": str(status)})

    def _set_incoming(self, status: Status) -> None:
        with self._lock:
            self._incoming_status = status
            self._emit("MIGRATION", {"status": str(status)})

    def _emit(self, name: str, data: Mapping[str, object] | None = None) -> None:
        if name.startswith("MIGRATION") and not self._capabilities.events:
            return
        event = Event(name, data, time.time())
        for callback in list(self._subscribers):
            callback(event)


def _pages(block: RamBlock) -> int:
    attached = attach(block, writable=False)
    try:
        return attached.length // block.page_size
    finally:
        attached.close()
