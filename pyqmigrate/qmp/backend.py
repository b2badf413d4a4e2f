"""The interface between the QMP server and a migration.

It is independent of JSON and sockets, so that a program can drive the same object directly. Texts of
errors are QEMU's where QEMU has one; :mod:`pyqmigrate.migration.rules` has the checks and their
order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol
from uuid import UUID

from pyqmigrate.qapi.address import Address
from pyqmigrate.qapi.capabilities import Capabilities
from pyqmigrate.qapi.event import Event
from pyqmigrate.qapi.parameters import Parameters
from pyqmigrate.qapi.status import MigrationInfo, RunState

__all__ = ["MigrationBackend", "TakeFd"]

TakeFd = Callable[[str], int]
"""Returns the descriptor that a client named with getfd, which the caller then owns.
Raises FdsetError for an unknown name."""


class MigrationBackend(Protocol):
    """One guest's migrations: one outgoing at a time, and at most one incoming.

    Every method may be called from any thread. None blocks for longer than it takes to open
    files, to stop the guest, or to take a lock that is held for a short time only; ``query``,
    ``capabilities``, ``parameters`` and ``run_state`` take well under a millisecond, since they
    are called from an event loop.
    """

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities in force."""
        ...

    @property
    def parameters(self) -> Parameters:
        """The parameters in force."""
        ...

    @property
    def run_state(self) -> RunState:
        """The guest's run state.

        After an outgoing migration: ``postmigrate`` if it completed, else the state before it.
        Before and during an incoming one: ``inmigrate``; after it, the state in the stream, or
        ``paused`` if that is running and the embedder asked not to start.
        """
        ...

    @property
    def uuid(self) -> UUID | None:
        """The guest's identity, if it has one."""
        ...

    def memory_size(self) -> int:
        """Return the size of the guest's RAM in bytes."""
        ...

    def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        """Merge ``changes`` over the capabilities, all or nothing.

        Raises UsageError: ``There's a migration process in progress`` while an outgoing one
        runs (even when nothing would change), or what ``Capabilities.merge`` raises.
        """
        ...

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        """Merge ``changes`` over the parameters, all or nothing, at any time.

        ``max-bandwidth`` has effect at once, also on a migration under way; nothing else has.
        Raises UsageError as ``Parameters.merge`` does, with the policy and the capabilities in
        force and ``running`` as it is.
        """
        ...

    def migrate(self, address: Address, *, resume: bool, take_fd: TakeFd) -> None:
        """Start an outgoing migration; return when its target is open and status is ``setup``.

        Order: the checks of ``rules.check_outgoing`` (and the strict ones), which change no state
        if one fails; then status ``setup`` with its event; then the open. A failed
        open leaves status ``failed`` with its text (event too), the run state as it was, and
        raises. An FD address is opened with ``take_fd`` at that moment.

        Later, from a thread: PASS 1, ``active``, [PASS 2...,] STOP when the guest ran,
        [``pre-switchover`` until ``migrate_continue``,] ``device``, PASS n, ``completed``. A
        write error: ``failed``, the guest running again if it ran. A new migration forgets the
        error of the last one, a failed check does not.
        """
        ...

    def migrate_incoming(self, address: Address, *, exit_on_error: bool, take_fd: TakeFd) -> None:
        """Start a load; return when the source is open.

        Order: ``rules.check_incoming`` before the address is parsed (so the monitor calls
        ``check_incoming_allowed`` first), then ``check_incoming_transport``, then
        status ``setup`` and the open. In compat mode a failed open leaves ``setup`` for good;
        in strict mode the status goes back to ``none``, and another attempt is possible.

        Later, from a thread: ``active``, [RESUME,] ``completed``; or ``failed``, and with
        ``exit_on_error`` the callback that asks the server to end.
        """
        ...

    def check_incoming_allowed(self) -> None:
        """Raise UsageError as ``rules.check_incoming`` does."""
        ...

    def cancel(self) -> None:
        """Cancel the outgoing migration, if one runs: ``cancelling``, then ``cancelled``.

        Returns at once; raises nothing.
        """
        ...

    def migrate_continue(self, state: str) -> None:
        """Go on from ``pre-switchover``.

        Raises UsageError: ``Migration not in expected state: <status>`` unless ``state`` is
        the status at this moment.
        """
        ...

    def query(self) -> MigrationInfo:
        """Return the state of the outgoing migration, or of the incoming one on a destination."""
        ...

    def stop(self) -> None:
        """Stop the guest (event STOP); no effect if it is stopped or waits."""
        ...

    def cont(self) -> None:
        """Run the guest (event RESUME), also from ``postmigrate``.

        While it waits for a migration, only note that it is to run afterwards.
        """
        ...

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``callback`` for every event from now on; return the function that ends that.

        It is called in the order of the events, on the threads on which they happen, must not
        block, and gets MIGRATION and MIGRATION_PASS only while the capability ``events`` is on.
        """
        ...
