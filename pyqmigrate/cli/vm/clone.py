"""Start several guests from one snapshot; they share its page cache.

After ``--`` comes the command line that the VM was started with, in which ``{n}`` is the number of
the guest, from 1 on; without it, the one that vm save recorded is used. --with-disks gives each
guest new overlays, N.SNAPSHOT.DISK.qcow2, over the disks as they were at the snapshot's instant.
Each guest gets a monitor DIR/N.qmp of its own (DIR is created) and no standard input. Disks that
more than one guest would write to are refused, and so are sockets at which more than one would
listen. If a guest fails, the others go on. Increments, and the pages that vm restore --record has
recorded, are used as by vm restore. In mode lazy each guest has a page server and memory of its own.

Every guest inherits the descriptors of this command. One that two guests name (-netdev tap,fd=5) is
refused, unless it is a file open for reading only: fd=1{n} gives each its own.

The command waits until all guests have ended, and forwards SIGINT, SIGTERM and SIGHUP to them. The
exit code is 4 if a guest could not be started, or its QEMU failed later.

JSON, printed as soon as all guests are restored: ``guests``, a list of ``number``, ``qmp``, and
either ``error`` or what vm restore prints. If a QEMU fails later, standard error and the exit code
report it.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING, Any

from pyqmigrate.cli.arguments import Verbs, add_offset, add_verb
from pyqmigrate.cli.exit_codes import ExitCode, exit_code
from pyqmigrate.cli.interruption import run_interruptible
from pyqmigrate.cli.outcome import Outcome, announce, error_data, printable, shown_error, table
from pyqmigrate.cli.vm.lazy import add_lazy, lazy_shown, working_set_of
from pyqmigrate.cli.vm.restore import (
    add_base,
    add_cache,
    add_command,
    add_disks,
    add_run_state,
    ended,
    pass_signals_on,
)
from pyqmigrate.cli.vm.store_messages import store_messages_shown
from pyqmigrate.errors import QemuError
from pyqmigrate.vm.incoming.options import Mode

if TYPE_CHECKING:
    from pyqmigrate.vm.incoming.clone import Clone

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "clone", _run, __doc__)
    parser.add_argument("snapshot", metavar="SNAPSHOT")
    add_base(parser)
    parser.add_argument("--count", type=int, required=True, metavar="N", help="number of guests")
    parser.add_argument(
        "--dir",
        default=".",
        metavar="DIR",
        help="directory of the monitors (default: the current one)",
    )
    parser.add_argument(
        "--mode",
        choices=list(map(str, Mode)),
        default=str(Mode.AUTO),
        help="how guest memory is restored (default: auto)",
    )
    add_run_state(parser)
    add_offset(parser)
    add_disks(parser, "the directory of the monitors")
    add_lazy(parser)
    add_cache(parser)
    add_command(parser)


def _run(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.vm.incoming.inherited_fds import inherited_descriptors

    return run_interruptible(_clone(args, inherited_descriptors()))


async def _clone(args: argparse.Namespace, fds: tuple[int, ...]) -> Outcome:
    from pyqmigrate.vm.incoming.clone import clone

    clones = await clone(
        args.snapshot,
        args.command or None,
        args.count,
        directory=args.dir,
        mode=args.mode,
        paused=args.paused,
        offset=args.offset,
        pass_fds=fds,
        with_disks=args.with_disks,
        disks_dir=args.disks_dir,
        disks_as_they_are=args.disks_as_they_are,
        base=args.base,
        cache=args.cache,
        working_set=working_set_of(args),
        push=args.push,
        huge_pages=args.huge_pages,
    )
    vms = [clone.vm for clone in clones if clone.vm is not None]
    pass_signals_on(vms)
    announce(args, {"guests": [_data(clone) for clone in clones]}, _lines(clones))
    async with store_messages_shown(vms), lazy_shown(vms):
        codes = await asyncio.gather(*(vm.wait() for vm in vms))
    await asyncio.gather(*(vm.close() for vm in vms))
    failed = len(clones) - len(vms)
    if failed:
        return ended(f"{failed} of {len(clones)} guests could not be started")
    if any(codes):
        return ended(f"{sum(map(bool, codes))} of {len(codes)} QEMUs failed")
    return ended()


def _data(clone: Clone) -> dict[str, Any]:
    data: dict[str, Any] = {"number": clone.number, "qmp": str(clone.qmp)}
    if clone.vm is None:
        error = clone.error or QemuError()
        return data | {"error": error_data(error, exit_code(error) or ExitCode.GUEST)}
    return data | clone.vm.report.to_json()


def _lines(clones: list[Clone]) -> list[str]:
    rows = [
        (
            clone.number,
            clone.vm.report.pid,
            clone.vm.report.run_state,
            clone.vm.report.mode,
            f"{clone.vm.report.load_seconds * 1000:.1f} ms",
            clone.qmp,
        )
        for clone in clones
        if clone.vm is not None
    ]
    errors = [
        f"guest {clone.number}: {shown_error(clone.error)}"
        for clone in clones
        if clone.error is not None
    ]
    notes = dict.fromkeys(
        note for clone in clones if clone.vm is not None for note in clone.vm.report.notes
    )
    return [
        *table(("guest", "pid", "state", "mode", "load", "monitor"), rows, left=1),
        *(f"note   {printable(note)}" for note in notes),
        *errors,
    ]
