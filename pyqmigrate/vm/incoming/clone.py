"""Many guests from one snapshot.

    for guest in await clone("/snap/guest.mapped", command, 10, directory="/run/guests"):
        print(guest.number, guest.qmp, guest.error or guest.vm.report.load_seconds)

All map the same file: they share its page cache, and each uses memory for the pages it changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, cast

from pyqmigrate.errors import NotSupported, PyqmigrateError, UsageError, target_error
from pyqmigrate.io.target import Target
from pyqmigrate.vm.cancellation import acquired, shielded
from pyqmigrate.vm.incoming.identity import shared_identity
from pyqmigrate.vm.incoming.incoming_streams import IncomingStreams
from pyqmigrate.vm.incoming.inherited_fds import descriptors_in_use
from pyqmigrate.vm.incoming.keywords import VmCloneOptions, VmRestoreOptions
from pyqmigrate.vm.incoming.listeners import listeners
from pyqmigrate.vm.incoming.options import DiskOptions, Mode, RestoreOptions
from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.incoming.restore import restore_from
from pyqmigrate.vm.incoming.restore_command import ChosenCommand, CommandChoice
from pyqmigrate.vm.incoming.shared_files import written_files
from pyqmigrate.vm.incoming.source import RestoreSource, map_source
from pyqmigrate.vm.qemu.command_line import CommandLine, Option

__all__ = ["Clone", "clone", "make_directory", "refuse_shared"]


@dataclass(frozen=True)
class Clone:
    """Guest ``number`` (from 1 on), its monitor socket, and either ``vm`` or ``error``."""

    number: int
    qmp: Path
    vm: RestoredVm | None = None
    error: PyqmigrateError | None = None


async def clone(
    snapshot: Target,
    command: Sequence[str] | None = None,
    count: int = 1,
    **options: Unpack[VmCloneOptions],
) -> list[Clone]:
    """Restore ``count`` guests from one snapshot.

    ``{n}`` in a word of ``command`` is the number of the guest, from 1 on. Each guest gets a monitor
    ``directory/N.qmp`` and no standard input. Each gets a new ``guid`` of ``vmgenid``, unless
    ``{n}`` is in the given one. The options are those of :class:`~pyqmigrate.vm.VmCloneOptions`.

    A guest that fails has its error in the list; the others go on. If the call is cancelled, all
    are ended. Raises UsageError if guests would write to the same disk or file, listen at the same
    address, or use the same descriptor (unless it is a file open for reading only), TargetError if
    the directory cannot be created, and the errors of opening the snapshot.
    """
    if count < 1:
        raise UsageError(f"count must be at least 1, not {count}")
    at_once = options.get("at_once") or os.cpu_count() or 1
    directory = Path(options.get("directory", "."))
    restore_options = _restore_options(options, directory)
    return await _clone(snapshot, command, count, directory, at_once, restore_options)


def _restore_options(options: VmCloneOptions, directory: Path) -> RestoreOptions:
    """Return the options that all guests share."""
    if unknown := options.keys() - VmCloneOptions.__optional_keys__:
        raise TypeError(f"clone() got an unexpected keyword argument {min(unknown)!r}")
    values: dict[str, Any] = {**options}
    for name in ("at_once", "directory"):
        values.pop(name, None)
    if values.get("disks_dir") is None:
        values["disks_dir"] = directory
    checked = RestoreOptions.check(cast("VmRestoreOptions", values))
    return checked._replace(stdin=subprocess.DEVNULL)


async def _clone(
    snapshot: Target,
    command: Sequence[str] | None,
    count: int,
    directory: Path,
    at_once: int,
    options: RestoreOptions,
) -> list[Clone]:
    slots = asyncio.Semaphore(at_once)
    started: list[RestoredVm] = []
    chosen: dict[int, ChosenCommand] = {}

    async def make(streams: IncomingStreams, number: int) -> Clone:
        qmp = directory / f"{number}.qmp"
        async with slots:
            try:
                vm = await restore_from(streams, chosen[number], options._replace(qmp=qmp))
            except PyqmigrateError as error:
                return Clone(number, qmp, error=error)
        started.append(vm)
        return Clone(number, qmp, vm)

    try:
        async with await IncomingStreams.open(
            snapshot,
            options.offset,
            options.base,
            options.cache,
            ahead=options.reads_ahead,
            pages=options.reads_pages,
        ) as streams:
            await asyncio.to_thread(make_directory, directory)
            choosing = asyncio.to_thread(_choose, streams.source, command, count, options.disks)
            chosen = await acquired(choosing, _discard)
            commands = {number: choice.command for number, choice in chosen.items()}
            mode = refuse_shared(commands, streams.source, options.mode, command is None)
            options = options._replace(mode=mode)
            tasks = [asyncio.create_task(make(streams, number)) for number in chosen]
            try:
                await asyncio.wait(tasks)
            finally:  # the streams must not be closed before the tasks end
                for task in tasks:
                    task.cancel()
                await shielded(_wait_for(tasks))
        return [task.result() for task in tasks]
    except BaseException:
        await shielded(_end_all(started))
        _discard(chosen)
        raise


def _choose(
    source: RestoreSource, words: Sequence[str] | None, count: int, disks: DiskOptions
) -> dict[int, ChosenCommand]:
    """Return the command line of each guest, with its own overlays; all or none."""
    choice = CommandChoice(source, words, disks)
    if words is None:
        choice.leave_monitors_out()
    choice.notes.append(shared_identity(choice.command))
    chosen: dict[int, ChosenCommand] = {}
    try:
        for number in range(1, count + 1):
            command = choice.command if words is None else choice.command.filled_in(number)
            chosen[number] = choice.settle(command, str(number))
    except BaseException:
        _discard(chosen)
        raise
    return chosen


def _discard(chosen: dict[int, ChosenCommand]) -> None:
    for choice in chosen.values():
        choice.discard()


async def _wait_for(tasks: Sequence[asyncio.Task[Clone]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def _end_all(started: Sequence[RestoredVm]) -> None:
    await asyncio.gather(*(vm.end() for vm in started), return_exceptions=True)


def refuse_shared(
    commands: dict[int, CommandLine], source: RestoreSource, mode: Mode, recorded: bool
) -> Mode:
    """Raise UsageError for what guests cannot share; return the mode for which the check holds.

    Memory mapped from the snapshot is no longer in the file that the command line names. A
    ``recorded`` command line has no ``{n}``.
    """
    hint = " (give the whole command line after --)" if recorded else ""
    started = commands
    if mode in (Mode.AUTO, Mode.INSTANT):
        with contextlib.suppress(NotSupported):
            started = {
                number: map_source(command, source).command for number, command in commands.items()
            }
    for first, second, address, option in _in_common(commands, _addresses):
        raise UsageError(
            f"guests {first} and {second} would both listen at {address} ({option}): put {{n}} "
            f"into it{hint}"
        )
    for first, second, file, option in _in_common(started, written_files):
        raise UsageError(
            f"guests {first} and {second} would both write to {file!r} ({option}): put {{n}} into "
            f"its name and give each a copy or an overlay of its own, or make it read-only{hint}"
        )
    for first, second, descriptor, option in _in_common(commands, descriptors_in_use):
        raise UsageError(
            f"guests {first} and {second} would both use {descriptor} ({option}), which serves one: "
            f"put {{n}} into its number{hint}"
        )
    if any(_in_common(commands, written_files)):
        return Mode.INSTANT  # a load would have them write to the same memory file
    return mode


def make_directory(directory: Path) -> None:
    """Create the directory of the monitors, with its parents. Raises TargetError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise target_error(
            error, "cannot create the directory of the monitors", directory
        ) from error


def _addresses(command: CommandLine) -> dict[str, Option]:
    return {listener.address: listener.option for listener in listeners(command)}


def _in_common(
    commands: dict[int, CommandLine], find: Callable[[CommandLine], dict[str, Option]]
) -> Iterator[tuple[int, int, str, Option]]:
    """Generate pairs of guests that share something, its name, and the option of the second."""
    owners: dict[str, int] = {}
    for number, command in commands.items():
        for name, option in find(command).items():
            owner = owners.setdefault(name, number)
            if owner != number:
                yield owner, number, name, option
