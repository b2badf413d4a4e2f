"""A guest with its outgoing migrations and at most one incoming: the public face of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.errors import JobTimeout, UsageError
from pyqmigrate.io.memory import RamBlock, attach, check_blocks
from pyqmigrate.migration.fdset import FdSets
from pyqmigrate.migration.guest import Guest
from pyqmigrate.migration.incoming import IncomingMigration
from pyqmigrate.migration.outgoing import OutgoingMigration
from pyqmigrate.migration.state import MigratedGuest, RunControl, SharedState
from pyqmigrate.migration.target import TakeFd, no_named_fd
from pyqmigrate.qapi.address import Address, parse_uri
from pyqmigrate.qapi.capabilities import Capabilities
from pyqmigrate.qapi.event import Event
from pyqmigrate.qapi.parameters import Parameters
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qapi.status import MigrationInfo, RunState, Status

__all__ = ["Migration"]


class Migration:
    """A guest's migrations to and from files.

    blocks: the guest's RAM.
    guest: stops and continues the guest, reports dirty pages, and saves and loads devices; the
        default is a guest whose memory never changes.
    fdsets: resolves ``/dev/fdset/N``; the default has no sets.
    machine, target_page_bits: for the stream, as in :func:`pyqmigrate.save`.
    uuid: the guest's, written and compared while the capability ``validate-uuid`` is on.
    policy: STRICT refuses before the start what QEMU fails or dies on later; the others behave as
        that version of QEMU does, and fail where it would crash.
    run_state: what the guest does now. With ``incoming`` it waits in ``inmigrate`` for
        :meth:`migrate_incoming`, and then runs if the stream says so and ``autostart`` is true.
    capabilities, parameters: the initial ones. By default bandwidth is unlimited.
    on_exit: called if an incoming migration fails that was started with ``exit_on_error``.

    All methods may be called from any thread. A running migration has one thread of its own, and
    its channels.
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
        guest = guest or Guest()
        self._guest = MigratedGuest(
            interface=guest,
            blocks=tuple(blocks),
            num_pages=tuple(_num_pages(block) for block in blocks),
            machine=machine,
            target_page_bits=target_page_bits,
            uuid=uuid,
        )
        self._shared = SharedState(
            policy,
            fdsets or FdSets(),
            capabilities or Capabilities(),
            parameters or Parameters(max_bandwidth=0),
        )
        self._run_control = RunControl(
            guest, self._shared, RunState.INMIGRATE if incoming else run_state, autostart=autostart
        )
        self._outgoing = OutgoingMigration(self._guest, self._run_control, self._shared)
        self._incoming = IncomingMigration(
            self._guest, self._run_control, self._shared, awaited=incoming, on_exit=on_exit
        )

    @property
    def on_exit(self) -> Callable[[], None] | None:
        return self._incoming.on_exit

    @on_exit.setter
    def on_exit(self, callback: Callable[[], None] | None) -> None:
        self._incoming.on_exit = callback

    @property
    def capabilities(self) -> Capabilities:
        return self._shared.capabilities

    @property
    def parameters(self) -> Parameters:
        return self._shared.parameters

    @property
    def run_state(self) -> RunState:
        return self._run_control.state

    @property
    def uuid(self) -> UUID | None:
        return self._guest.uuid

    @property
    def fdsets(self) -> FdSets:
        return self._shared.fdsets

    @property
    def policy(self) -> Policy:
        return self._shared.policy

    def memory_size(self) -> int:
        """Return the size of the guest's RAM in bytes."""
        return sum(
            num_pages * block.page_size
            for num_pages, block in zip(self._guest.num_pages, self._guest.blocks, strict=True)
        )

    def query(self) -> MigrationInfo:
        """Return the state of the outgoing migration, or of the incoming one if the guest waits
        for it."""
        if self._incoming.awaited and self._outgoing.status is Status.NONE:
            return self._incoming.query()
        return self._outgoing.query()

    def wait(self, timeout: float | None = None) -> MigrationInfo:
        """Wait until no migration runs, and return its state.

        Raises JobTimeout after ``timeout`` seconds; the migration goes on.
        """
        workers = (self._outgoing.worker, self._incoming.worker)
        with self._shared.changed:
            if not self._shared.changed.wait_for(
                lambda: not any(worker.active for worker in workers), timeout
            ):
                raise JobTimeout(f"the migration has not ended after {timeout} s; it goes on")
        return self.query()

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``callback`` for every event from now on; return the function that ends that.

        It is called in the order of the events, on the threads on which they happen, and must not
        block. MIGRATION and MIGRATION_PASS are sent only while the capability ``events`` is on.
        """
        return self._shared.subscribe(callback)

    def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        """Merge changes over the capabilities, all or nothing; UsageError with QEMU's text."""
        shared = self._shared
        with shared.lock:
            if self._outgoing.status.running:
                raise UsageError("There's a migration process in progress")
            shared.capabilities = shared.capabilities.merge(
                changes, compressed_or_tls=shared.parameters.compressed_or_tls, policy=shared.policy
            )

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        """Merge changes over the parameters, all or nothing; UsageError with QEMU's text.

        ``max-bandwidth`` has effect at once, also on a running migration.
        """
        shared = self._shared
        with shared.lock:
            shared.parameters = shared.parameters.merge(
                changes,
                capabilities=shared.capabilities,
                policy=shared.policy,
                running=self._outgoing.status.running,
            )
            self._outgoing.apply_bandwidth()

    def migrate(
        self, address: Address | str, *, resume: bool = False, take_fd: TakeFd = no_named_fd
    ) -> None:
        """Start an outgoing migration to an address or URI; return when its target is open.

        Raises UsageError or FdsetError for a failed check, and then nothing has changed. Raises
        FdsetError, TargetError or UsageError if the target cannot be opened, and TargetError if no
        thread can be started; then the status is ``failed``. With COMPAT the status becomes
        ``failed`` without an error raised if only a descriptor with O_DIRECT is missing or refused:
        QEMU opens that after its reply (and 10.0 dies of it).
        """
        address = parse_uri(address) if isinstance(address, str) else address
        self._outgoing.start(address, resume=resume, take_fd=take_fd)

    def cancel(self) -> None:
        """Cancel the outgoing migration; returns at once, and does nothing if none runs.

        A migration that is already being made durable is completed instead.
        """
        self._outgoing.cancel()

    def migrate_continue(self, state: str) -> None:
        """Go on from ``pre-switchover``; UsageError in any other state than ``state``."""
        self._outgoing.leave_pre_switchover(state)

    def check_incoming_allowed(self) -> None:
        """Raise UsageError unless the guest waits for a migration and none was accepted yet."""
        self._incoming.check_allowed()

    def migrate_incoming(
        self, address: Address | str, *, exit_on_error: bool = True, take_fd: TakeFd = no_named_fd
    ) -> None:
        """Start a load from an address or URI; return when the source is open.

        Raises UsageError or FdsetError for a failed check, and then nothing has changed. Raises
        FdsetError, TargetError or UsageError if the source cannot be opened: the status goes back
        to ``none`` and another attempt is possible, except with COMPAT, where it stays ``setup`` as
        QEMU's does.
        """
        address = parse_uri(address) if isinstance(address, str) else address
        self._incoming.start(address, exit_on_error=exit_on_error, take_fd=take_fd)

    def stop(self) -> None:
        """Stop the guest (event STOP); no effect if it is stopped or waits."""
        self._run_control.stop()

    def cont(self) -> None:
        """Run the guest (event RESUME), also from ``postmigrate``.

        While it waits for a migration, only note that it is to run afterwards; while the last
        pages of one are saved, do nothing.
        """
        self._run_control.cont()

    def close(self) -> None:
        """Cancel an outgoing migration, wait for the threads, and close the fdsets. Idempotent."""
        self.cancel()
        self._outgoing.worker.join()
        self._incoming.worker.join()
        self._shared.fdsets.close()


def _num_pages(block: RamBlock) -> int:
    memory = attach(block, writable=False)
    try:
        return memory.length // block.page_size
    finally:
        memory.close()
