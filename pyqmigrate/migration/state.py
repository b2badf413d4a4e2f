"""What the migrations of one guest share: settings, descriptors, events, and the run state.

Locks are taken in the order in which the objects refer to each other, and never the other way:
a migration's own lock for starting it, then :class:`RunControl`'s, then :class:`SharedState`'s. An
object has a reference to objects further down only.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from uuid import UUID

from pyqmigrate.io.memory import RamBlock
from pyqmigrate.io.threads import start_thread
from pyqmigrate.migration import rules
from pyqmigrate.migration.fdset import FdSets, is_fdset_name
from pyqmigrate.migration.fdset_checks import Direction, check_fdset
from pyqmigrate.migration.guest import Guest
from pyqmigrate.qapi.address import Address, Transport
from pyqmigrate.qapi.capabilities import Capabilities
from pyqmigrate.qapi.event import Event
from pyqmigrate.qapi.parameters import Parameters
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qapi.status import RunState

__all__ = ["MigratedGuest", "RunControl", "SharedState", "Worker"]


@dataclass(frozen=True)
class MigratedGuest:
    """The constant properties of a guest; ``num_pages`` has a number for each block."""

    interface: Guest
    blocks: tuple[RamBlock, ...]
    num_pages: tuple[int, ...]
    machine: str
    target_page_bits: int | None
    uuid: UUID | None


@dataclass
class SharedState:
    """Settings, fdsets and events, under one lock.

    The lock is never held for long: an event loop waits for it.
    """

    policy: Policy
    fdsets: FdSets
    capabilities: Capabilities
    parameters: Parameters
    lock: threading.RLock = field(default_factory=threading.RLock)
    _subscribers: list[Callable[[Event], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.changed = threading.Condition(self.lock)

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``callback`` for every event from now on; return the function that ends that."""
        with self.lock:
            self._subscribers.append(callback)

        def unsubscribe() -> None:
            with self.lock, contextlib.suppress(ValueError):
                self._subscribers.remove(callback)

        return unsubscribe

    def emit(self, name: str, data: Mapping[str, object] | None = None) -> None:
        """Send an event; the caller holds the lock."""
        if name.startswith("MIGRATION") and not self.capabilities.events:
            return
        event = Event(name, data, time.time())
        for callback in list(self._subscribers):
            callback(event)

    def check_strictly(self, address: Address, direction: Direction) -> None:
        """Refuse, with the policy STRICT, what QEMU would start and later fail on."""
        if self.policy is not Policy.STRICT:
            return
        rules.check_strictly(self.capabilities)
        if address.transport is Transport.FILE and is_fdset_name(address.path):
            check_fdset(
                self.fdsets,
                address.path,
                direction,
                direct_io=rules.effective_direct_io(self.capabilities, self.parameters),
                offset=address.offset,
            )


class RunControl:
    """The run state of a guest, and the one place that stops and continues it.

    ``lock`` is held while the guest is stopped or continued, which may take long. ``state`` can be
    read without it.
    """

    def __init__(
        self, guest: Guest, shared: SharedState, state: RunState, *, autostart: bool
    ) -> None:
        self.lock = threading.RLock()
        self.state = state
        self._guest = guest
        self._shared = shared
        self._autostart = autostart

    @property
    def executing(self) -> bool:
        """Whether the guest's processors run."""
        return self.state is RunState.RUNNING

    def stop(self) -> None:
        """Stop the guest; while it waits for a migration, only note that it is not to run."""
        with self.lock:
            if self.state is RunState.INMIGRATE:
                self._autostart = False
            if self.executing:
                self._guest.stop()
                self.set(RunState.PAUSED, "STOP")

    def cont(self) -> None:
        """Run the guest; while it waits for a migration, only note that it is to run."""
        with self.lock:
            if self.state is RunState.INMIGRATE:
                self._autostart = True
            elif self.state not in (RunState.RUNNING, RunState.FINISH_MIGRATE):
                self._guest.cont()
                self.set(RunState.RUNNING, "RESUME")

    def stop_for_switchover(self, before: Callable[[], None]) -> bool:
        """Stop a running guest for the last pass, and return whether it was running.

        ``before`` is called before the guest is stopped.
        """
        with self.lock:
            if not self.executing:
                return False
            before()
            self._guest.stop()
            self.set(RunState.FINISH_MIGRATE, "STOP")
            return True

    def undo_switchover(self, state: RunState) -> None:
        """Continue the guest after ``stop_for_switchover``, and make ``state`` its run state.

        Raises the errors of the guest's ``cont``; the run state changes all the same.
        """
        with self.lock:
            try:
                self._guest.cont()
            finally:
                self.set(state, "RESUME")

    def start_loaded(self, state: RunState) -> None:
        """Give the guest the run state from its stream; it runs only if it may."""
        with self.lock:
            if state is not RunState.RUNNING:
                self.set(state)
            elif self._autostart:
                self._guest.cont()
                self.set(state, "RESUME")
            else:
                self.set(RunState.PAUSED)

    def set(self, state: RunState, event: str | None = None) -> None:
        """Set the run state, and send its event."""
        with self._shared.lock:
            self.state = state
            if event is not None:
                self._shared.emit(event)


class Worker:
    """The thread of one migration. Its attributes are read and set under the shared lock."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None

    @property
    def active(self) -> bool:
        """Whether a migration is under way; ``finish`` ends that."""
        return self._thread is not None

    def start(self, work: Callable[[], None]) -> None:
        """Start the thread. Raises TargetError if that fails; nothing has changed then."""
        thread = threading.Thread(target=work, name=self._name)
        start_thread(thread)
        self._thread = thread

    def finish(self) -> None:
        """Note that the migration is over; called by its own thread, or instead of it."""
        self._thread = None

    def join(self) -> None:
        """Wait for the thread to end, unless it is the caller."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
