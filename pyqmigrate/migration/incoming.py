"""One guest's incoming migration: its file, the check of its settings, the load, and the thread."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

from pyqmigrate.errors import (
    BlockMismatch,
    NotSupported,
    PyqmigrateError,
    SnapshotError,
    SnapshotTruncated,
    TargetError,
)
from pyqmigrate.format.device.sections import DeviceSection, run_state_of
from pyqmigrate.format.stream.configuration import IGNORE_SHARED, Configuration
from pyqmigrate.format.stream.mapped_ram_reader import parse
from pyqmigrate.format.stream.wire import Section, SectionKind, Stream
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.bitmap_order import find_order
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import Memory, RamBlock
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.log import logger
from pyqmigrate.migration import rules
from pyqmigrate.migration.fdset_checks import Direction
from pyqmigrate.migration.rules import effective_direct_io
from pyqmigrate.migration.state import MigratedGuest, RunControl, SharedState, Worker
from pyqmigrate.migration.target import TakeFd, open_error, target_of
from pyqmigrate.qapi.address import Address
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qapi.status import MigrationInfo, RunState, Status
from pyqmigrate.snapshot.load.mapped_ram import LoadReport, start_load
from pyqmigrate.snapshot.load.sequential import SequentialReader

__all__ = ["IncomingMigration"]

_LOADED_STATE_MAX = 256 << 20  # bytes of one device's state; real ones have some KiB to some MiB


class IncomingMigration:
    """The incoming migration of a guest that waits for one.

    ``status`` is set under the shared lock. on_exit: called if a load fails that was started with
    ``exit_on_error``.
    """

    def __init__(
        self,
        guest: MigratedGuest,
        run_control: RunControl,
        shared: SharedState,
        *,
        awaited: bool,
        on_exit: Callable[[], None] | None,
    ) -> None:
        self.status = Status.NONE
        self.worker = Worker("pyqmigrate-incoming")
        self.on_exit = on_exit
        self.awaited = awaited
        self._guest = guest
        self._run_control = run_control
        self._shared = shared
        self._starting = threading.Lock()
        self._started = False
        self._error = ""

    def query(self) -> MigrationInfo:
        """Return the status, and the error of a failed load."""
        return MigrationInfo(self.status, self._error)

    def check_allowed(self) -> None:
        """Raise UsageError unless the guest waits for a migration and has not accepted one."""
        rules.check_incoming(deferred=self.awaited, started=self._started)

    def start(self, address: Address, *, exit_on_error: bool, take_fd: TakeFd) -> None:
        """Do what :meth:`pyqmigrate.migration.machine.Migration.migrate_incoming` documents."""
        shared = self._shared
        with self._starting:
            with shared.lock:
                self.check_allowed()
                rules.check_incoming_transport(
                    address.transport, shared.capabilities, shared.parameters, status=self.status
                )
                shared.check_strictly(address, Direction.LOAD)
                self._set_status(Status.SETUP)
            try:
                file = _IncomingFile(address, shared, take_fd, self._guest.uuid)
            except (PyqmigrateError, OSError) as error:
                if shared.policy is Policy.STRICT:
                    self.status = Status.NONE
                raise open_error("open", address, error) from error
            with shared.lock:
                self._started = True
                try:
                    self.worker.start(lambda: self._run(file, exit_on_error))
                except TargetError:
                    file.close()
                    self._started = False
                    self.status = Status.NONE
                    raise

    def _run(self, file: _IncomingFile, exit_on_error: bool) -> None:
        try:
            self._set_status(Status.ACTIVE)
            with contextlib.closing(file):
                devices, report = file.load(self._guest.blocks)
            logger.debug("incoming migration: %s", report)
            self._guest.interface.load_devices(devices)
            stored = run_state_of(devices)
            known = {str(state): state for state in RunState}
            self._run_control.start_loaded(known.get(stored or "", RunState.RUNNING))
            self._end(Status.COMPLETED)
        except BaseException as error:
            logger.info("incoming migration failed: %s", error)
            self._end(Status.FAILED, f"load of migration failed: {self._reason(error)}")
            if exit_on_error and self.on_exit is not None:
                self.on_exit()

    def _reason(self, error: BaseException) -> str:
        """Return the reason of a failed load, with the policy ``compat`` in QEMU's words."""
        policy = self._shared.policy
        if not policy.compat:
            return str(error)
        number = getattr(error, "errno", None) or errno.EINVAL
        if isinstance(error, SnapshotTruncated) and not self._shared.capabilities.mapped_ram:
            number = errno.EIO
        # QEMU 10.0 prints the reason on its standard error only.
        return (
            f"{os.strerror(number)}: {error}" if policy.qemu.load_reasons else os.strerror(number)
        )

    def _end(self, status: Status, error: str = "") -> None:
        with self._shared.changed:
            self._error = error
            self.worker.finish()
            self._set_status(status)
            self._shared.changed.notify_all()

    def _set_status(self, status: Status) -> None:
        with self._shared.lock:
            self.status = status
            self._shared.emit("MIGRATION", {"status": str(status)})


class _IncomingFile:
    """The open file of an incoming migration; close it.

    Raises FdsetError, TargetError or UsageError if it cannot be opened. :meth:`load` checks its
    content.
    """

    def __init__(
        self, address: Address, shared: SharedState, take_fd: TakeFd, uuid: UUID | None
    ) -> None:
        self._policy = shared.policy
        self._capabilities = shared.capabilities
        self._uuid = uuid
        self._parameters = shared.parameters
        self._direct = effective_direct_io(self._capabilities, self._parameters)
        with contextlib.ExitStack() as stack:
            target = target_of(
                address,
                Direction.LOAD,
                direct_io=self._direct,
                policy=shared.policy,
                fdsets=shared.fdsets,
                take_fd=take_fd,
                resources=stack,
            )
            self._input = InputFile(target)
            stack.callback(self._input.close)
            self._resources = stack.pop_all()

    def load(self, blocks: Sequence[RamBlock]) -> tuple[list[DeviceSection], LoadReport]:
        """Load the blocks; return the devices' sections in the order of the stream, and a report.

        Blocks of the stream that are not in ``blocks`` are ignored. Raises SnapshotError,
        BlockMismatch, NotSupported, TargetError, GuestMemoryError.
        """
        memories: Mapping[str, Memory] = {block.name: block.memory for block in blocks}
        if not self._capabilities.mapped_ram:
            return self._load_sequential(memories)
        try:
            stream = parse(self._input, self._input.offset)
        except NotSupported as error:
            raise SnapshotError(
                "Capability mapped-ram is on, but received capability is off"
            ) from error
        if stream.background:
            raise SnapshotError(
                "no RAM END section: a background snapshot, whose bitmaps were never written; "
                "convert it to mapped-ram first"
            )
        self._check_settings(stream)
        return self._load_mapped(stream, memories)

    def _load_sequential(
        self, memories: Mapping[str, Memory]
    ) -> tuple[list[DeviceSection], LoadReport]:
        try:
            reader = SequentialReader(
                StreamFile(self._input, self._input.offset), memories, skip_unknown_blocks=True
            )
        except NotSupported as error:
            raise SnapshotError(
                "Capability mapped-ram is off, but received capability is on"
            ) from error
        with contextlib.closing(reader):
            self._check_settings(reader.configuration)
            report = reader.run()
        return list(report.devices), report

    def _check_settings(self, received: Configuration | Stream) -> None:
        """Check capabilities and UUID; a UUID that one side lacks is not compared."""
        on = IGNORE_SHARED in received.capabilities
        if on != self._capabilities.x_ignore_shared:
            state = {True: "on", False: "off"}
            raise SnapshotError(
                f"Capability x-ignore-shared is {state[not on]}, but received capability is "
                f"{state[on]}"
            )
        if not self._capabilities.validate_uuid or None in (received.uuid, self._uuid):
            return
        if UUID(bytes=received.uuid) != self._uuid:
            raise SnapshotError(
                f"UUID received is {UUID(bytes=received.uuid)} and local is {self._uuid}"
            )

    def _load_mapped(
        self, stream: Stream, memories: Mapping[str, Memory]
    ) -> tuple[list[DeviceSection], LoadReport]:
        if (
            self._policy.compat
            and not self._policy.qemu.external_blocks
            and IGNORE_SHARED in stream.capabilities
        ):
            raise SnapshotError(
                "QEMU before 11.0 cannot load mapped-ram together with x-ignore-shared"
            )
        names = {block.name for block in stream.blocks}
        missing = [name for name in memories if name not in names]
        if missing:
            raise BlockMismatch(f"the stream has no block {missing[0]!r}")
        with contextlib.ExitStack() as stack:
            loaded = []
            order = find_order(self._input, stream.blocks, stream.machine)
            for layout in stream.blocks:
                if layout.name in memories and not layout.external:
                    bitmap = Bitmap.read_from(self._input, layout, order)
                    stack.callback(bitmap.close)
                    loaded.append((layout, bitmap))
            job: Job[LoadReport] = start_load(
                self._input,
                loaded,
                {layout.name: memories[layout.name] for layout, _ in loaded},
                channels=self._parameters.multifd_channels if self._capabilities.multifd else 1,
                direct_io=DirectIO.ON if self._direct else DirectIO.OFF,
            )
            report = job.result()
        return self._devices(stream.sections), report

    def _devices(self, sections: Sequence[Section]) -> list[DeviceSection]:
        devices = []
        for section in sections:
            if section.kind is not SectionKind.FULL:
                continue
            if section.body_length > _LOADED_STATE_MAX:
                raise SnapshotError(
                    f"the state of device {section.name!r} has {section.body_length} bytes; at most"
                    f" {_LOADED_STATE_MAX} are loaded",
                    offset=section.offset,
                )
            data = self._input.read_at(section.body_offset, section.body_length)
            devices.append(
                DeviceSection(section.name, data, section.instance_id, section.version_id)
            )
        return devices

    def close(self) -> None:
        """Close the file and release its descriptors. Idempotent."""
        self._resources.close()
