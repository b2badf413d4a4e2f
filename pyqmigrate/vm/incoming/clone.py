"""Many guests from one snapshot.

    for one in await clone("/snap/guest.mapped", command, 10, directory="/run/guests"):
        print(one.number, one.qmp, one.error or one.vm.report.load_seconds)

Each is a QEMU of its own that maps the same file: they share its page cache, and each pays for
the pages that it changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import NotSupported, PyqmigrateError, TargetError, UsageError
from pyqmigrate.io.target import Target
from pyqmigrate.vm.cancellation import acquired, shielded
from pyqmigrate.vm.guest.written_files import written_files
from pyqmigrate.vm.incoming.incoming_streams import IncomingStreams
from pyqmigrate.vm.incoming.identity import shared_identity
from pyqmigrate.vm.incoming.inherited_fds import check_descriptors, descriptors_in_use
from pyqmigrate.vm.incoming.listeners import listeners
from pyqmigrate.vm.incoming.ram_mapping import map_blocks
from pyqmigrate.vm.incoming.options import Disks, Mode, Request
from pyqmigrate.vm.incoming.restore import RestoredVm, restore_from
from pyqmigrate.vm.incoming.restore_command import ChosenCommand, CommandChoice
from pyqmigrate.vm.incoming.source import RestoreSource
from pyqmigrate.vm.qemu.command_line import CommandLine, Option

__all__ = ["Clone", "clone"]


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
    *,
    directory: str | os.PathLike[str] = ".",
    mode: Mode | str = Mode.AUTO,
    paused: bool | None = None,
    offset: int | None = None,
    at_once: int | None = None,
    pass_fds: Collection[int] = (),
    with_disks: bool = False,
    disks_dir: str | os.PathLike[str] | None = None,
    disks_as_they_are: bool = False,
) -> list[Clone]:
    """Restore ``count`` guests from one snapshot.

    ``{n}`` in a word of ``command`` is the number of the guest, from 1 on. Each gets a monitor
    ``directory/N.qmp`` of its own, and no standard input; the directory is made. ``at_once`` start
    at the same time (as many as there are processors). command, mode, paused, offset, with_disks,
    disks_as_they_are: as for :func:`pyqmigrate.vm.restore`; overlays are made in ``disks_dir``
    (None: ``directory``), their names begin with the number of the guest.
    Every guest gets all of ``pass_fds``; ``fd=1{n}`` gives guest 2 the use of descriptor 12. Each
    has a number of ``vmgenid`` of its own; a fixed one with ``{n}`` in it stays.

    A guest that fails has its error in the list; the others go on. When the call is cancelled,
    all are ended. Raises UsageError when guests would write to the same disk or file, or use the
    same descriptor (other than a file that is open for reading only), or listen at the same
    address, TargetError when the directory cannot be made, and what is wrong with the snapshot
    itself.
    """
    if count < 1:
        raise UsageError(f"{count} guests cannot be made")
    place = Path(directory)
    disks = Disks(with_disks, place if disks_dir is None else Path(disks_dir), disks_as_they_are)
    request = Request(
        parse_enum(Mode, mode, "mode"),
        paused,
        stdin=subprocess.DEVNULL,
        pass_fds=check_descriptors(pass_fds),
    )
    place = Path(directory)
    turn = asyncio.Semaphore(at_once or os.cpu_count() or 1)
    started: list[RestoredVm] = []

    async def one(companions: IncomingStreams, number: int) -> Clone:
        qmp = place / f"{number}.qmp"
        async with turn:
            try:
                vm = await restore_from(companions, chosen[number], replace(request, qmp=qmp))
            except PyqmigrateError as error:
                return Clone(number, qmp, error=error)
        started.append(vm)
        return Clone(number, qmp, vm)

    chosen: dict[int, ChosenCommand] = {}
    try:
        async with await IncomingStreams.open(snapshot, offset) as companions:
            await asyncio.to_thread(_make_directory, place)
            choosing = asyncio.to_thread(_choose, companions.source, command, count, disks)
            chosen = await acquired(choosing, _discard)
            commands = {number: each.command for number, each in chosen.items()}
            mode = _refuse_shared(commands, companions.source, request.mode, command is None)
            request = replace(request, mode=mode)
            tasks = [asyncio.create_task(one(companions, number)) for number in chosen]
            try:
                await asyncio.wait(tasks)
            finally:  # they use what is closed after this
                for task in tasks:
                    task.cancel()
                await shielded(_all_ended(tasks))
        return [task.result() for task in tasks]
    except BaseException:
        await shielded(_end_all(started))
        _discard(chosen)
        raise


def _choose(
    source: RestoreSource, words: Sequence[str] | None, count: int, disks: Disks
) -> dict[int, ChosenCommand]:
    """The command line of each guest, with overlays of its own; all or none."""
    parse_enum = CommandChoice(source, words, disks)
    if words is None:
        parse_enum.leave_monitors_out()
    parse_enum.notes.append(shared_identity(parse_enum.command))
    chosen: dict[int, ChosenCommand] = {}
    try:
        for number in range(1, count + 1):
            command = (
                parse_enum.command.filled_in(number) if words is not None else parse_enum.command
            )
            chosen[number] = parse_enum.settle(command, str(number))
    except BaseException:
        _discard(chosen)
        raise
    return chosen


def _discard(chosen: dict[int, ChosenCommand]) -> None:
    for each in chosen.values():
        each.discard()


async def _all_ended(tasks: Sequence[asyncio.Task[Clone]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def _end_all(started: Sequence[RestoredVm]) -> None:
    await asyncio.gather(*(vm.end() for vm in started), return_exceptions=True)


def _refuse_shared(
    commands: dict[int, CommandLine], source: RestoreSource, mode: Mode, recorded: bool
) -> Mode:
    """UsageError for what guests cannot share; the mode in which that holds.

    Memory that is mapped from the snapshot is no longer in the file that the command line names.
    ``recorded``: the command line is that of the record, in which nothing has a number.
    """
    whole = " (give the whole command line after --)" if recorded else ""
    made = commands
    if mode in (Mode.AUTO, Mode.INSTANT):
        with contextlib.suppress(NotSupported):
            made = {
                number: map_blocks(command, source.snapshot, source.fd).command
                for number, command in commands.items()
            }
    for one, other, address, option in _in_common(commands, _addresses):
        raise UsageError(
            f"guests {one} and {other} would both listen at {address} ({option}): put {{n}} into it"
            f"{whole}"
        )
    for one, other, file, option in _in_common(made, written_files):
        raise UsageError(
            f"guests {one} and {other} would both write to {file!r} ({option}): put {{n}} into "
            f"its name and give each a copy or an overlay of its own, or make it read-only{whole}"
        )
    for one, other, descriptor, option in _in_common(commands, descriptors_in_use):
        raise UsageError(
            f"guests {one} and {other} would both have {descriptor} ({option}), which serves one: "
            f"put {{n}} into its number{whole}"
        )
    if any(_in_common(commands, written_files)):
        return Mode.INSTANT  # loaded, they would write to the same memory file
    return mode


def _make_directory(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(
            error.errno or errno.EIO, "cannot make the directory of the monitors", place
        ) from error


def _addresses(command: CommandLine) -> dict[str, Option]:
    return {listener.address: listener.option for listener in listeners(command)}


def _in_common(
    commands: dict[int, CommandLine], find: Callable[[CommandLine], dict[str, Option]]
) -> Iterator[tuple[int, int, str, Option]]:
    """Two guests that share something, what that is, and the option of the second."""
    owners: dict[str, int] = {}
    for number, command in commands.items():
        for name, option in find(command).items():
            owner = owners.setdefault(name, number)
            if owner != number:
                yield owner, number, name, option
