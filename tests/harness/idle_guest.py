"""A guest with no memory, for tests of the monitor: it checks, opens, and has nothing to move.

Everything up to the open of the target is real: the checks and their order, the fdsets, the
truncation. A migration whose target opened completes at once, or waits where a test asks.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping

from pyqmigrate.errors import UsageError
from pyqmigrate.migration import rules
from pyqmigrate.migration.fdset import FdsetError, FdSets, is_fdset_name
from pyqmigrate.qapi.address import Address, Transport
from pyqmigrate.qapi.capabilities import Capabilities
from pyqmigrate.qapi.parameters import Parameters
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qapi.status import MigrationInfo, RamStatistics, RunState, Status
from pyqmigrate.qmp import Event


class IdleGuest:
    def __init__(
        self, fdsets: FdSets, *, policy=Policy.COMPAT, incoming=False, hold=False, memory=0
    ) -> None:
        self.fdsets = fdsets
        self.policy = policy
        self.incoming = incoming
        self.hold = hold  # stay in `active` until cancelled
        self.memory = memory
        self.uuid = None
        self.capabilities = Capabilities()
        self.parameters = Parameters()
        self.run_state = RunState.INMIGRATE if incoming else RunState.RUNNING
        self.exit_asked = threading.Event()
        self._info = MigrationInfo()
        self._started = False
        self._callbacks: list[Callable[[Event], None]] = []
        self._file = None

    def memory_size(self) -> int:
        return self.memory

    def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        if self._info.status.running and not self.incoming:
            raise UsageError("There's a migration process in progress")
        self.capabilities = self.capabilities.merge(
            changes, compressed_or_tls=self.parameters.compressed_or_tls, policy=self.policy
        )

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        self.parameters = self.parameters.merge_json(
            dict(changes),
            capabilities=self.capabilities,
            policy=self.policy,
            running=self._info.status.running,
        )

    def migrate(self, address: Address, *, resume: bool, take_fd: Callable[[str], int]) -> None:
        rules.check_outgoing(
            address.transport,
            self.capabilities,
            self.parameters,
            status=Status.NONE if self.incoming else self._info.status,
            run_state=self.run_state,
            resume=resume,
        )
        self._become(Status.SETUP)
        try:
            self._file = self._open(address, os.O_WRONLY | os.O_CREAT, take_fd)
        except OSError as error:
            self._become(Status.FAILED, str(error.strerror))
            raise
        self._become(Status.ACTIVE)
        if not self.hold:
            self._end(Status.COMPLETED)
            self.run_state = RunState.POSTMIGRATE

    def check_incoming_allowed(self) -> None:
        rules.check_incoming(deferred=self.incoming, started=self._started)

    def migrate_incoming(self, address, *, exit_on_error, take_fd) -> None:
        rules.check_incoming_transport(
            address.transport, self.capabilities, self.parameters, status=self._info.status
        )
        self._become(Status.SETUP)
        self._file = self._open(address, os.O_RDONLY, take_fd)
        self._started = True
        self._become(Status.ACTIVE)
        self._end(Status.FAILED, "load of migration failed: Invalid argument")
        if exit_on_error:
            self.exit_asked.set()

    def cancel(self) -> None:
        if self._info.status.running and not self.incoming:
            self._become(Status.CANCELLING)
            self._end(Status.CANCELLED)

    def migrate_continue(self, state: str) -> None:
        if state != self._info.status:
            raise UsageError(f"Migration not in expected state: {self._info.status}")

    def query(self) -> MigrationInfo:
        return self._info

    def stop(self) -> None:
        if self.run_state is RunState.RUNNING:
            self.run_state = RunState.PAUSED
            self._tell("STOP")

    def cont(self) -> None:
        if self.run_state in (RunState.PAUSED, RunState.POSTMIGRATE):
            self.run_state = RunState.RUNNING
            self._tell("RESUME")

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def close(self) -> None:
        self.cancel()

    def _end(self, status: Status, error: str = "") -> None:
        self._file.close()
        self._become(status, error)

    def _become(self, status: Status, error: str = "") -> None:
        ram = None if self.incoming else RamStatistics(total=self.memory)
        self._info = MigrationInfo(status, error, ram)
        if self.capabilities.events:
            self._tell("MIGRATION", {"status": str(status)})

    def _tell(self, name: str, data: Mapping[str, object] | None = None) -> None:
        for callback in list(self._callbacks):
            callback(Event(name, data, time.time()))

    def _open(self, address: Address, flags: int, take_fd: Callable[[str], int]):
        if address.transport is Transport.FD:
            return os.fdopen(take_fd(address.path), "rb", buffering=0)
        if is_fdset_name(address.path):
            file = self.fdsets.open(address.path, flags)
        else:
            verb = "create" if flags & os.O_CREAT else "open"
            try:
                fd = os.open(address.path, flags, 0o600)
            except OSError as error:
                text = f"Could not {verb} '{address.path}': {error.strerror}"
                raise FdsetError(error.errno, text) from None
            file = os.fdopen(fd, "rb" if flags == os.O_RDONLY else "wb", buffering=0)
        if flags & os.O_CREAT:
            try:
                os.ftruncate(file.fileno(), address.offset)
            except (OSError, OverflowError) as error:
                file.close()
                raise FdsetError(
                    getattr(error, "errno", None) or 22,
                    f"failed to truncate migration file to offset {address.offset:x}: "
                    f"{getattr(error, 'strerror', None) or 'Invalid argument'}",
                ) from None
        return file
