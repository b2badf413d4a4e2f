"""Guests 1, 2, 3 and so on of one snapshot, which is opened and checked once.

All map the same file and load the same incoming stream, as clones do.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pyqmigrate.io.target import Target
from pyqmigrate.vm.cancellation import acquired, shielded
from pyqmigrate.vm.incoming.clone import refuse_shared
from pyqmigrate.vm.incoming.incoming_streams import IncomingStreams
from pyqmigrate.vm.incoming.options import Mode, RestoreOptions
from pyqmigrate.vm.incoming.restore import restore_from
from pyqmigrate.vm.incoming.restore_command import ChosenCommand, CommandChoice
from pyqmigrate.vm.incoming.run_state import RUNS
from pyqmigrate.vm.incoming.saved_machine import read_saved_machine
from pyqmigrate.vm.pool.guest import PooledGuest

if TYPE_CHECKING:
    from pyqmigrate.io.view import SharedView

__all__ = ["GuestSeries"]

_COMPARED = 2  # guests whose command lines are compared: what two share, all share
_READY = ("paused", "prelaunch")  # the run states of a guest that cont resumes


class GuestSeries:
    """Restores guests from an open snapshot, each paused. Close it after the last guest has ended.

    ``runs``: whether a guest shall run when it is handed over.
    """

    def __init__(
        self,
        streams: IncomingStreams,
        words: Sequence[str] | None,
        directory: Path,
        options: RestoreOptions,
    ) -> None:
        """Check the command line. Raises UsageError for what guests cannot share, or a missing
        command line; SnapshotError for a damaged record; TargetError."""
        self._streams = streams
        self._directory = directory
        self._given = words is not None
        self._numbers = itertools.count(1)
        self._choice = CommandChoice(streams.source, words, options.disks)
        if words is None:
            self._choice.leave_monitors_out()
        self.runs = self._shall_run(options.paused)
        self._options = options._replace(
            mode=self._check_shared(options.mode), paused=True, stdin=subprocess.DEVNULL, bound=True
        )

    @classmethod
    async def open(
        cls, snapshot: Target, words: Sequence[str] | None, directory: Path, options: RestoreOptions
    ) -> Self:
        """Open a snapshot; raises what the constructor raises, and the errors of opening it."""
        streams = await IncomingStreams.open(
            snapshot, options.offset, options.base, options.cache, pages=options.reads_pages
        )
        try:
            return await asyncio.to_thread(cls, streams, words, directory, options)
        except BaseException:
            await shielded(streams.__aexit__())
            raise

    async def start(self, on_end: Callable[[PooledGuest], None]) -> PooledGuest:
        """Start and load the next guest; see :func:`pyqmigrate.vm.restore` for the errors."""
        number = next(self._numbers)
        qmp = self._directory / f"{number}.qmp"
        choosing = asyncio.to_thread(self._choose, number)
        chosen = await acquired(choosing, ChosenCommand.discard)
        vm = await restore_from(self._streams, chosen, self._options._replace(qmp=qmp))
        try:
            return PooledGuest(number, qmp, vm, chosen, on_end)
        except BaseException:
            await vm.end()
            chosen.discard()
            raise

    @property
    def view(self) -> SharedView | None:
        """The view of a snapshot of a store; None for a file."""
        return self._streams.source.pages_from.source.view

    def can_run(self, guest: PooledGuest) -> bool:
        """Whether ``cont`` resumes the guest: it had not crashed or shut down when it was saved."""
        return guest.run_state in _READY

    async def close(self) -> None:
        """Close the snapshot. Idempotent."""
        self._streams.source.cancel_prefetch()
        await self._streams.__aexit__()

    def _choose(self, number: int) -> ChosenCommand:
        command = self._choice.command
        return self._choice.settle(
            command.filled_in(number) if self._given else command, str(number)
        )

    def _check_shared(self, mode: Mode) -> Mode:
        """Raise UsageError for what two guests cannot share; return the mode for which that holds."""
        with contextlib.ExitStack() as stack:
            commands = {}
            for number in range(1, 1 + _COMPARED):
                chosen = self._choose(number)
                stack.callback(chosen.discard)
                commands[number] = chosen.command
            return refuse_shared(commands, self._streams.source, mode, not self._given)

    def _shall_run(self, paused: bool | None) -> bool:
        if paused is not None:
            return not paused
        if self._choice.command.has("S"):
            return False
        source = self._streams.source
        saved = read_saved_machine(source.snapshot).run_state
        return source.was_running or saved is None or saved in RUNS
