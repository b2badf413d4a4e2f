"""An instant restore up to the moment at which the new QEMU's process is there.

None of it needs an event loop or a monitor. A command begins here, and imports both while QEMU
starts: that takes Python as long as QEMU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyqmigrate.errors import TargetError
from pyqmigrate.io.target import Target
from pyqmigrate.io.threads import start_thread
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.vm.incoming.command import make_incoming
from pyqmigrate.vm.incoming.compatibility import compare_command
from pyqmigrate.vm.incoming.images_in_use import refuse_in_use
from pyqmigrate.vm.incoming.listeners import refuse_taken
from pyqmigrate.vm.incoming.ram_files import RamFiles
from pyqmigrate.vm.incoming.ram_mapping import Mapped, map_blocks
from pyqmigrate.vm.incoming.options import Request
from pyqmigrate.vm.incoming.restore_command import ChosenCommand, choose_command
from pyqmigrate.vm.incoming.saved_machine import read_saved_machine
from pyqmigrate.vm.incoming.source import RestoreSource
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.spawn import QemuProcess, start

__all__ = ["StartedRestore", "EarlyRestore", "begin", "begin_mapped", "prepare"]


@dataclass(frozen=True)
class StartedRestore:
    """A QEMU that has been started, to map ``mapped`` from ``source``, which stays open.

    ``files`` are the memory files that it has besides. End it, or give it to
    :func:`pyqmigrate.vm.incoming.restore.finish_restore`.
    """

    source: RestoreSource
    mapped: Mapped
    files: RamFiles
    started: QemuProcess

    def end(self) -> None:
        """End the process and let go of its files. May be repeated."""
        self.started.end()
        self.files.close()


def prepare(
    command: CommandLine, request: Request, snapshot: MappedRamSnapshot
) -> tuple[CommandLine, Request, tuple[str, ...]]:
    """The command line of a QEMU that waits for a snapshot, the request with what that says, and
    what was changed. Raises UsageError for options that contradict a restore or the snapshot, and
    for sockets and disks that another process uses."""
    if request.paused is None and command.has("S"):
        request = replace(request, paused=True)
    command, notes = make_incoming(command, paused=request.paused)
    refuse_taken(command, request.qmp)
    refuse_in_use(command)
    notes += compare_command(command, read_saved_machine(snapshot))
    return command, request, tuple(notes)


def begin_mapped(source: RestoreSource, mapped: Mapped, request: Request) -> StartedRestore:
    """Start the QEMU of ``mapped``. Not in the main thread.

    Raises QemuError, UsageError, and what RamFiles refuses.
    """
    files = RamFiles(mapped.command, source.snapshot, mapped.blocks)
    try:
        started = start(
            mapped.command,
            [source.fd, *request.pass_fds],
            qmp=request.qmp,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
    except BaseException:
        files.close()
        raise
    return StartedRestore(source, mapped, files, started)


@dataclass(frozen=True)
class EarlyRestore:
    """What was begun before there was an event loop, and what it was made from."""

    begun: StartedRestore
    command: CommandLine
    request: Request
    notes: tuple[str, ...]
    chosen: ChosenCommand

    def end(self) -> None:
        """May be repeated."""
        self.begun.end()
        self.begun.source.close()
        self.chosen.discard()


def begin(
    snapshot: Target, command: Sequence[str] | None, request: Request, *, offset: int | None = None
) -> EarlyRestore | None:
    """Begin an instant restore; arguments as for :func:`pyqmigrate.vm.restore`.

    None where nothing could be begun, for whatever reason: a restore finds it again, and says it
    or goes another way. Whatever interrupts the wait ends what was begun.
    """
    found: list[EarlyRestore] = []

    def work() -> None:
        try:
            found.append(_begin(snapshot, command, request, offset))
        except Exception:  # the restore that follows meets it again, where it can be told
            return

    # In a thread, where no signal can raise between the fork and our knowing of it.
    thread = threading.Thread(target=work, name="pyqmigrate-begin")
    try:
        start_thread(thread)
    except TargetError:  # the restore meets this again too
        return None
    try:
        thread.join()
    except BaseException:
        thread.join()
        for early in found:
            early.end()
        raise
    return found[0] if found else None


def _begin(
    snapshot: Target, words: Sequence[str] | None, request: Request, offset: int | None
) -> EarlyRestore:
    source = RestoreSource(snapshot, offset)
    with contextlib.ExitStack() as undo:
        undo.callback(source.close)
        chosen = choose_command(source, words, request.disks)
        undo.callback(chosen.discard)
        command, request, notes = prepare(chosen.command, request, source.snapshot)
        mapped = map_blocks(command, source.snapshot, source.fd)
        begun = begin_mapped(source, mapped, request)
        undo.pop_all()
        return EarlyRestore(begun, command, request, (*chosen.notes, *notes), chosen)
