"""The part of a restore that runs before the event loop: up to the guest's first instruction.

An event loop, and a monitor for it, take Python longer to import than QEMU needs to start: they are imported
when the guest runs. So is, while QEMU starts, what loads the snapshot. QEMU itself is started before the modules
that check the restore are imported (:mod:`pyqmigrate.vm.incoming.qemu_ahead`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyqmigrate.errors import TargetError
from pyqmigrate.io.target import Target
from pyqmigrate.io.threads import start_thread
from pyqmigrate.vm.incoming.options import Mode, RestoreOptions

if TYPE_CHECKING:
    from pyqmigrate.vm.incoming.early_restore import EarlyRestore
    from pyqmigrate.vm.incoming.instant_start import InstantStart
    from pyqmigrate.vm.incoming.lazy_keeper import StartedKeeper

__all__ = ["EarlyStart", "start_early"]


def start_early(
    snapshot: Target, command: Sequence[str] | None, options: RestoreOptions
) -> EarlyStart | None:
    """Start an instant or a lazy restore; arguments as for :func:`pyqmigrate.vm.restore`. Not for a
    process with threads: a lazy one forks.

    Returns None if it cannot begin, for any reason: the restore that follows meets it again and reports it,
    or loads.
    """
    keeper = _forked_keeper(snapshot) if options.mode is Mode.LAZY else None
    if options.mode is Mode.LAZY and keeper is None:
        return None
    start = EarlyStart(snapshot, command, options, keeper)
    # In a thread: a signal handler cannot raise between fork and bookkeeping.
    thread = threading.Thread(target=start.run, name="pyqmigrate-start")
    try:
        start_thread(thread)
    except TargetError:  # likewise
        return None
    return start


class EarlyStart:
    """A start in a thread of its own (:meth:`run`)."""

    def __init__(
        self,
        snapshot: Target,
        words: Sequence[str] | None,
        options: RestoreOptions,
        keeper: StartedKeeper | None,
    ) -> None:
        self._snapshot, self._words, self._options = snapshot, words, options
        self._keeper = keeper
        self._loading: InstantStart | None = None
        self._signals: list[int] = []
        self._ended = threading.Event()
        self._result: EarlyRestore | None = None
        self._failure: Exception | None = None

    def signal(self, number: int) -> None:
        """Take a signal that ends the restore: for a signal handler of the thread that calls :meth:`result`.

        QEMU is ended, soon, or has the signal if its guest may have run.
        """
        self._signals.append(number)
        if self._loading is not None:
            self._loading.abandon()
        if self._ended.is_set():
            self._pass_on(number)

    def result(self) -> EarlyRestore | None:
        """Wait for the end of the start.

        Returns None if QEMU could not be started, as :func:`start_early` does. Raises what an instant restore
        raises once QEMU has started, which has ended then; and KeyboardInterrupt after a :meth:`signal`, unless
        the guest may have run.
        """
        self._ended.wait()
        for number in self._signals:
            self._pass_on(number)
        if self._signals and not self._is_loaded:
            if self._result is not None:
                self._result.end()
            raise KeyboardInterrupt
        if self._failure is not None:
            raise self._failure
        return self._result

    @property
    def _is_loaded(self) -> bool:
        return self._result is not None and self._result.signal_guest is not None

    def _pass_on(self, number: int) -> None:
        if self._result is not None and self._result.signal_guest is not None:
            self._result.signal_guest(number)

    def run(self) -> None:
        try:
            self._result = self._start() if self._keeper is None else self._start_lazy(self._keeper)
        except Exception as error:
            self._failure = error if self._is_failure(error) else None
        finally:
            self._ended.set()

    def _start(self) -> EarlyRestore:
        from pyqmigrate.vm.incoming.qemu_ahead import start_ahead

        waiting = start_ahead(self._snapshot, self._words, self._options)
        try:
            # Imported while QEMU loads itself.
            from pyqmigrate.vm.incoming.early_restore import start_instant
        except BaseException:
            if waiting is not None:
                waiting.end()
                waiting.input.close()
            raise
        return start_instant(self._snapshot, self._words, self._options, waiting, self._begin)

    def _start_lazy(self, keeper: StartedKeeper) -> EarlyRestore:
        from pyqmigrate.vm.incoming.early_restore import start_lazy

        return start_lazy(self._snapshot, self._words, self._options, keeper)

    def _begin(self, loading: InstantStart) -> None:
        self._loading = loading
        if self._signals:
            loading.abandon()

    def _is_failure(self, error: Exception) -> bool:
        """Return whether the restore has failed; else it begins again, and meets the error if that is one."""
        if self._loading is None:
            return False
        from pyqmigrate.vm.incoming.instant_start import NotStarted

        return not isinstance(error, NotStarted)


def _forked_keeper(snapshot: Target) -> StartedKeeper | None:
    # Loaded only for this, and before the fork, which has it then: it imports all that an instant restore
    # does without.
    import pyqmigrate.vm.incoming.lazy_start  # noqa: F401
    from pyqmigrate.vm.incoming.forked_keeper import fork_keeper

    try:
        return fork_keeper(snapshot if isinstance(snapshot, str) else "")
    except TargetError:  # the restore that follows meets it again
        return None
