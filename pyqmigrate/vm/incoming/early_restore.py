"""Restores that a command starts before it has an event loop (:mod:`pyqmigrate.vm.incoming.early_start`)."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pyqmigrate.io.target import Target
from pyqmigrate.vm.incoming.mapped_start import (
    StartedRestore,
    prepare,
    start_mapped,
    start_mapped_with,
)
from pyqmigrate.vm.incoming.options import RestoreOptions
from pyqmigrate.vm.incoming.ram_mapping import Mapped
from pyqmigrate.vm.incoming.restore_command import ChosenCommand, choose_command
from pyqmigrate.vm.incoming.saved_machine import read_saved_machine
from pyqmigrate.vm.incoming.source import RestoreSource, map_source
from pyqmigrate.vm.qemu.command_line import CommandLine

if TYPE_CHECKING:
    from pyqmigrate.vm.incoming.instant_start import InstantStart, LoadedInstant
    from pyqmigrate.vm.incoming.lazy_keeper import StartedKeeper
    from pyqmigrate.vm.incoming.lazy_start import StartedLazy
    from pyqmigrate.vm.incoming.qemu_ahead import QemuAhead

__all__ = ["EarlyRestore", "start_instant", "start_lazy"]


class EarlyRestore(NamedTuple):
    """A restore that was started before there is an event loop, and what it was made from."""

    started: StartedRestore | LoadedInstant | StartedLazy
    command: CommandLine
    options: RestoreOptions
    notes: tuple[str, ...]
    chosen: ChosenCommand

    @property
    def signal_guest(self) -> Callable[[int], None] | None:
        """What sends a signal to QEMU, if its guest has been loaded and may run: it is no longer to be ended
        as if it had not."""
        from pyqmigrate.vm.incoming.instant_start import LoadedInstant

        return (
            self.started.qemu.process.send_signal
            if isinstance(self.started, LoadedInstant)
            else None
        )

    def end(self) -> None:
        """End QEMU and remove its overlays. Can be called again."""
        self.started.end()
        self.started.source.close()
        self.chosen.discard()


def start_instant(
    snapshot: Target,
    words: Sequence[str] | None,
    options: RestoreOptions,
    waiting: QemuAhead | None,
    begin: Callable[[InstantStart], None],
) -> EarlyRestore:
    """Start an instant restore, and load it unless a working set is recorded.

    ``waiting`` is taken over: it goes on if it fits, else it is ended. ``begin`` gets the load right before
    that begins.
    """
    with contextlib.ExitStack() as undo:
        if waiting is not None:
            undo.callback(waiting.end)
        source = RestoreSource(
            snapshot,
            options.offset,
            options.base,
            options.cache,
            record=options.record is not None,
            ahead=options.reads_ahead,
            input_file=None if waiting is None else waiting.input,
        )
        undo.callback(source.close)
        chosen = choose_command(source, words, options.disks)
        undo.callback(chosen.discard)
        command, options, notes = prepare(chosen.command, options, source)
        mapped = map_source(command, source)
        started: StartedRestore | LoadedInstant
        if options.record is None:
            started = _load(source, mapped, options, waiting, begin)
        else:  # a recording has to begin before the load
            started = start_mapped(source, mapped, options)
        undo.pop_all()
        return EarlyRestore(started, command, options, (*chosen.notes, *notes), chosen)


def _load(
    source: RestoreSource,
    mapped: Mapped,
    options: RestoreOptions,
    waiting: QemuAhead | None,
    begin: Callable[[InstantStart], None],
) -> LoadedInstant:
    with contextlib.ExitStack() as stack:
        go_on = None if waiting is None else waiting.way_on(mapped.command, source.mapped_fd)
        if waiting is not None and go_on is not None:
            monitor = stack.enter_context(waiting.monitor)
            started = start_mapped_with(go_on, source, mapped, options)
        else:
            if waiting is not None:
                waiting.end()
            monitor, qemu_end = socket.socketpair()
            stack.enter_context(monitor)
            with qemu_end:  # the end of QEMU must be noticed
                started = start_mapped(source, mapped, options, qemu_end)
        with contextlib.ExitStack() as undo:
            undo.callback(started.end)
            # Imported while QEMU starts.
            from pyqmigrate.vm.incoming.instant_start import InstantStart

            saved = read_saved_machine(source.snapshot)
            loading = InstantStart(
                source, mapped, started.files, started.qemu, monitor, saved, options
            )
            undo.pop_all()
        begin(loading)
        return loading.run()


def start_lazy(
    snapshot: Target, words: Sequence[str] | None, options: RestoreOptions, keeper: StartedKeeper
) -> EarlyRestore:
    """Start a lazy restore with a ``keeper``, which is taken over."""
    with contextlib.ExitStack() as undo:
        undo.callback(keeper.end)
        from pyqmigrate.vm.incoming.lazy_start import LazyStart

        source = RestoreSource(
            snapshot, options.offset, options.base, options.cache, pages=options.reads_pages
        )
        undo.callback(source.close)
        chosen = choose_command(source, words, options.disks)
        undo.callback(chosen.discard)
        command, options, notes = prepare(chosen.command, options, source)
        started = LazyStart(source, command, options, keeper).run()
        undo.pop_all()
        return EarlyRestore(started, command, options, (*chosen.notes, *notes), chosen)
