"""One guest's outgoing migrations: the target, the passes, the statistics, and the thread."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Mapping

from pyqmigrate.errors import Cancelled, PyqmigrateError, TargetError, UsageError
from pyqmigrate.format.device.sections import encode_devices, global_state
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.memory import FileMemory, RamBlock
from pyqmigrate.log import logger
from pyqmigrate.migration import rules
from pyqmigrate.migration.fdset_checks import Direction
from pyqmigrate.migration.rules import effective_direct_io
from pyqmigrate.migration.state import MigratedGuest, RunControl, SharedState, Worker
from pyqmigrate.migration.target import OpenError, TakeFd, open_error, opens_late, target_of
from pyqmigrate.qapi.address import Address
from pyqmigrate.qapi.parameters import MigrationMode, ZeroPageDetection
from pyqmigrate.qapi.status import MigrationInfo, RamStatistics, RunState, Status
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.sequential import SequentialWriter
from pyqmigrate.snapshot.save.writer import SaveOptions, Sparse, StreamWriter

__all__ = ["OutgoingMigration"]

_MOST_PASSES = 30


class _SwitchoverInterrupted(Cancelled):
    """Cancelled while the guest waited in ``pre-switchover``."""


class OutgoingMigration:
    """The outgoing migrations of a guest, one at a time.

    ``status`` is that of the running migration or the last one; it is set under the shared lock.
    """

    def __init__(self, guest: MigratedGuest, run_control: RunControl, shared: SharedState) -> None:
        self.status = Status.NONE
        self.worker = Worker("pyqmigrate-migrate")
        self._guest = guest
        self._run_control = run_control
        self._shared = shared
        self._starting = threading.Lock()
        self._last = MigrationInfo()
        self._writer: StreamWriter | None = None
        self._clock = _Clock()
        self._passes = 0
        self._pass_base = 0
        self._committing = False
        self._stopped_guest = False

    def query(self) -> MigrationInfo:
        """Return the status and the numbers of the running migration, or of the last one."""
        status = self.status
        if not status.running:
            return self._last
        return MigrationInfo(
            status,
            "",
            self._statistics(),
            self._clock.elapsed(),
            self._clock.setup,
            0,
            self._shared.parameters.downtime_limit,
        )

    def start(self, address: Address, *, resume: bool, take_fd: TakeFd) -> None:
        """Do what :meth:`pyqmigrate.migration.machine.Migration.migrate` documents."""
        shared = self._shared
        with self._starting:
            with shared.lock:
                rules.check_outgoing(
                    address.transport,
                    shared.capabilities,
                    shared.parameters,
                    status=self.status,
                    run_state=self._run_control.state,
                    resume=resume,
                )
                shared.check_strictly(address, Direction.SAVE)
                self._clock = _Clock()
                self._passes = self._pass_base = 0
                self._committing = self._stopped_guest = False
                self._set_status(Status.SETUP)
            resources = contextlib.ExitStack()
            try:
                writer = _open_writer(address, self._guest, shared, take_fd, resources)
            except (PyqmigrateError, OSError) as error:
                resources.close()
                failure = open_error("create", address, error)
                if shared.policy.compat and opens_late(error):
                    with shared.lock, contextlib.suppress(TargetError):
                        self.worker.start(lambda: self._fail(failure))
                        return
                self._fail(failure)
                raise failure from error
            with shared.lock:
                self._writer = writer
                self.apply_bandwidth()
                if self._cancelling():  # while the target was opened
                    writer.channels.cancel()
                try:
                    self.worker.start(lambda: self._run(resources))
                except TargetError as error:
                    resources.close()
                    self._end(Status.FAILED, error)
                    raise

    def apply_bandwidth(self) -> None:
        """Make ``max-bandwidth`` effective for a running migration; the caller holds the lock."""
        if self._writer is not None:
            self._writer.channels.set_rate(self._shared.parameters.max_bandwidth)

    def cancel(self) -> None:
        """Do what :meth:`pyqmigrate.migration.machine.Migration.cancel` documents."""
        with self._shared.changed:
            ending = self._committing or self.status is Status.FAILING
            if ending or not self.status.running:
                return
            if self.status is not Status.CANCELLING:
                self._set_status(Status.CANCELLING)
            if self._writer is not None:
                self._writer.channels.cancel()
            self._shared.changed.notify_all()

    def leave_pre_switchover(self, state: str) -> None:
        """Go on from ``pre-switchover``; UsageError in any other state than ``state``."""
        with self._shared.changed:
            if self.status != state or self.status is not Status.PRE_SWITCHOVER:
                raise UsageError(f"Migration not in expected state: {self.status}")
            self._set_status(Status.DEVICE)
            self._shared.changed.notify_all()

    def _run(self, resources: contextlib.ExitStack) -> None:
        writer = self._writer
        assert writer is not None
        before = self._run_control.state
        try:
            with resources:
                self._save(writer, before)
        except Cancelled as error:
            self._resume_guest(before)
            has_error = not self._cancelling() or (
                self._shared.policy.compat and isinstance(error, _SwitchoverInterrupted)
            )
            self._end(Status.CANCELLED, error if has_error else None)
        except BaseException as error:
            logger.info("outgoing migration failed: %s", error)
            ended = Status.CANCELLED if self._cancelling() else Status.FAILED
            if ended is Status.FAILED:
                self._begin_failing()
            self._resume_guest(before)
            if self._shared.policy.compat and isinstance(error, TargetError) and error.errno:
                error = OpenError(
                    error.errno, f"Unable to write to file: {os.strerror(error.errno)}"
                )
            self._end(ended, None if self._cancelling() else error)
        else:
            self._end(Status.COMPLETED, None)

    def _save(self, writer: StreamWriter, before: RunState) -> None:
        self._clock.end_setup()
        if self._shared.parameters.mode is MigrationMode.CPR_REBOOT and before is RunState.RUNNING:
            self._stop_for_switchover()
        self._begin_pass(event=self._shared.policy.qemu.first_pass_event)
        self._go_to(Status.ACTIVE)
        writer.begin()
        tracked = self._run_control.executing and self._guest.interface.dirty() is not None
        if self._run_control.executing and not tracked:
            self._stop_for_switchover()
        writer.write_pages()
        if tracked:
            self._repeat(writer)
        if not self._shared.policy.qemu.first_pass_event:
            self._begin_pass()
        if tracked:
            self._stop_for_switchover()
        if self._shared.capabilities.pause_before_switchover:
            self._pause(writer)
        else:
            self._go_to(Status.DEVICE)
        if self._shared.policy.qemu.first_pass_event:
            self._begin_pass()
        if tracked:
            dirty = self._guest.interface.dirty()
            if dirty is not None:
                self._write_dirty(writer, dirty, last=True)
            writer.clean()
        ignoring = (
            self._shared.capabilities.x_ignore_shared and self._shared.capabilities.mapped_ram
        )
        fails = self._shared.policy.compat and not self._shared.policy.qemu.external_blocks
        if fails and ignoring and any(map(_in_file, self._guest.blocks)):
            raise OpenError(errno.EFAULT, "Unable to write to file: Bad address")
        sections, description = encode_devices(
            [global_state(before), *self._guest.interface.save_devices()],
            self._guest.blocks[0].page_size,
        )
        with self._shared.lock:
            if self._cancelling():
                raise Cancelled("cancelled")
            self._committing = True
        writer.finish(sections, description)

    def _repeat(self, writer: StreamWriter) -> None:
        """Write dirty pages, pass after pass, until a pass fits into the downtime limit."""
        limit = self._shared.parameters.downtime_limit / 1000
        for _ in range(_MOST_PASSES):
            dirty = self._guest.interface.dirty() or {}
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
        chosen = _selections(dirty, self._guest)
        try:
            changed = sum(bitmap.count() for bitmap in chosen)
            if changed:
                if not last:  # the last one has begun already
                    self._begin_pass()
                writer.write_pages(chosen)
            return changed
        finally:
            for bitmap in chosen:
                bitmap.close()

    def _begin_pass(self, *, event: bool = True) -> None:
        with self._shared.lock:
            self._passes += 1
            if self._writer is not None:
                self._pass_base = self._writer.channels.totals().bytes_done
            if event:
                self._shared.emit("MIGRATION_PASS", {"pass": self._passes})

    def _stop_for_switchover(self) -> None:
        if self._run_control.stop_for_switchover(self._clock.start_downtime):
            self._stopped_guest = True

    def _pause(self, writer: StreamWriter) -> None:
        with self._shared.changed:
            self._go_to(Status.PRE_SWITCHOVER)
            self._shared.changed.wait_for(lambda: self.status is not Status.PRE_SWITCHOVER)
        if self._cancelling():
            raise _SwitchoverInterrupted(self._shared.policy.qemu.interrupted_switchover)

    def _resume_guest(self, before: RunState) -> None:
        """Restore the guest's run state after a failure or a cancel."""
        if self._stopped_guest:
            self._stopped_guest = False
            try:
                self._run_control.undo_switchover(before)
            except Exception:
                logger.exception("the guest could not be continued")

    def _cancelling(self) -> bool:
        return self.status is Status.CANCELLING

    def _go_to(self, status: Status) -> None:
        with self._shared.lock:
            if self._cancelling():
                raise Cancelled("cancelled")
            self._set_status(status)

    def _begin_failing(self) -> None:
        """Enter the status ``failing`` if the imitated QEMU has it."""
        if self._shared.policy.qemu.has(Status.FAILING):
            with self._shared.lock:
                self._set_status(Status.FAILING)

    def _end(self, status: Status, error: BaseException | None) -> None:
        with self._shared.changed:
            self._clock.end()
            statistics = self._statistics() if self._writer is not None else None
            if status is Status.COMPLETED:
                self._run_control.set(RunState.POSTMIGRATE)
            self._last = MigrationInfo(
                status,
                str(error) if error is not None else "",
                statistics,
                self._clock.total,
                self._clock.setup,
                self._clock.downtime,
                0,
            )
            self._writer = None
            self.worker.finish()
            self._set_status(status)
            self._shared.changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        self._begin_failing()
        self._end(Status.FAILED, error)

    def _statistics(self) -> RamStatistics:
        writer = self._writer
        if writer is None:
            return RamStatistics()
        totals = writer.channels.totals()
        page_size = self._guest.blocks[0].page_size
        seconds = max(self._clock.elapsed(), 1) / 1000
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
            multifd_bytes=totals.bytes_moved if self._shared.capabilities.multifd else 0,
            pages_per_second=round(totals.data_pages / seconds) if not finished else 0,
        )

    def _set_status(self, status: Status) -> None:
        self.status = status
        self._shared.emit("MIGRATION", {"status": str(status)})


def _open_writer(
    address: Address,
    guest: MigratedGuest,
    shared: SharedState,
    take_fd: TakeFd,
    resources: contextlib.ExitStack,
) -> StreamWriter:
    """Open the target of a migration. ``resources`` closes it and releases its descriptors.

    Raises FdsetError, TargetError, NotSupported or UsageError.
    """
    capabilities, parameters = shared.capabilities, shared.parameters
    direct = effective_direct_io(capabilities, parameters)
    target = target_of(
        address,
        Direction.SAVE,
        direct_io=direct,
        policy=shared.policy,
        fdsets=shared.fdsets,
        take_fd=take_fd,
        resources=resources,
    )
    uuid = guest.uuid.bytes if guest.uuid is not None and capabilities.validate_uuid else None
    in_files = [block.name for block in guest.blocks if _in_file(block)]
    left_out = in_files if capabilities.x_ignore_shared else None
    if not capabilities.mapped_ram:
        sequential = SequentialWriter(
            target,
            guest.blocks,
            SaveOptions(
                machine=guest.machine,
                target_page_bits=guest.target_page_bits,
                uuid=uuid,
                left_out=left_out,
                max_bandwidth=parameters.max_bandwidth,
            ),
        )
        resources.callback(sequential.close)
        return sequential
    all_pages = parameters.zero_page_detection is ZeroPageDetection.NONE
    writer = Writer(
        target,
        guest.blocks,
        SaveOptions(
            direct_io=DirectIO.ON if direct else DirectIO.OFF,
            sparse=Sparse.DENSE if all_pages else Sparse.AUTO,
            mark_zero=all_pages,
            channels=parameters.multifd_channels if capabilities.multifd else 1,
            machine=guest.machine,
            target_page_bits=guest.target_page_bits,
            uuid=uuid,
            left_out=left_out,
            max_bandwidth=parameters.max_bandwidth,
        ),
    )
    resources.callback(writer.close)
    return writer


def _in_file(block: RamBlock) -> bool:
    """Return whether the block's memory is a file, which x-ignore-shared leaves out."""
    return isinstance(block.memory, FileMemory)


def _selections(dirty: Mapping[str, object], guest: MigratedGuest) -> list[Bitmap]:
    """Return the dirty bitmaps of a guest as the selections of a pass, one for each block."""
    unknown = [name for name in dirty if name not in {block.name for block in guest.blocks}]
    if unknown:
        raise UsageError(f"a dirty bitmap was given for {unknown[0]!r}, which is not a block")
    chosen: list[Bitmap] = []
    for block, num_pages in zip(guest.blocks, guest.num_pages, strict=True):
        bitmap = Bitmap(num_pages)
        chosen.append(bitmap)
        given = dirty.get(block.name)
        if given is not None:
            bitmap.fill(memoryview(given).cast("B"))  # type: ignore[arg-type]
    return chosen


class _Clock:
    """Times of one migration, in milliseconds."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()
        self.setup = 0
        self.total = 0
        self.downtime = 0
        self._stopped_at: float | None = None

    def elapsed(self) -> int:
        """Return the time since the start."""
        return round((time.monotonic() - self._started_at) * 1000)

    def end_setup(self) -> None:
        self.setup = self.elapsed()

    def start_downtime(self) -> None:
        self._stopped_at = time.monotonic()

    def end(self) -> None:
        self.total = self.elapsed()
        if self._stopped_at is not None:
            self.downtime = round((time.monotonic() - self._stopped_at) * 1000)
