"""Keep guests of one snapshot ready, and hand them over on request.

N guests are started and loaded ahead, each paused before its first instruction. A client connects to
SOCKET, asks for a guest with one line of JSON, {"command": "take"}, and gets its monitor socket and
pid within milliseconds, while the next guest is started. {"command": "reset"} ends it and returns
another; {"command": "end"} only ends it. docs/pool.md has the protocol.

A guest belongs to the connection that took it: when the client hangs up, or dies, the guest is ended.
With --keep it goes on; any client may then reset or end it by its number. Only the user who runs the
pool may connect. All guests end with this command, however it ends.

After ``--`` comes the command line that the VM was started with, in which ``{n}`` is the number of
the guest, from 1 on, which is never used again; without it, the one that vm save recorded is used.
Each guest gets a monitor DIR/N.qmp of its own (DIR is created) and no standard input. What guests
cannot share is refused as by vm clone. --with-disks gives each guest new overlays, which are removed
when it ends.

The command ends on SIGINT, SIGTERM or SIGHUP, with exit code 0 once all guests were ready.

JSON, printed as soon as all guests are ready: ``socket``; ``directory`` of the monitors; ``pid`` of
the pool; ``ready``, the number of guests; ``limit``; ``keep``; ``runs``, whether a guest runs when it
is handed over; ``mode``; ``why``; ``machine``; ``qemu``, its version; ``start_seconds`` until the QEMU
of the first guest answered, ``load_seconds`` and ``total_seconds`` of its restore; ``notes``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import TYPE_CHECKING

from pyqmigrate.cli.arguments import Verbs, add_offset, add_verb
from pyqmigrate.cli.interruption import ending_signals, run_interruptible
from pyqmigrate.cli.outcome import Outcome, announce, counted, printable
from pyqmigrate.cli.vm.lazy import add_lazy, working_set_of
from pyqmigrate.cli.vm.restore import (
    add_base,
    add_cache,
    add_command,
    add_disks,
    add_run_state,
    ended,
)
from pyqmigrate.cli.vm.store_messages import store_messages_shown
from pyqmigrate.vm.incoming.options import Mode

if TYPE_CHECKING:
    from pyqmigrate.vm.pool.pool import Pool
    from pyqmigrate.vm.pool.server import PoolServer

__all__ = ["add_parser"]

_READY = 2
_LIMIT = 64


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "pool", _run, __doc__)
    parser.add_argument("snapshot", metavar="SNAPSHOT")
    add_base(parser)
    parser.add_argument(
        "--ready",
        type=int,
        default=_READY,
        metavar="N",
        help=f"number of guests that are kept ready (default: {_READY})",
    )
    parser.add_argument(
        "--socket", required=True, metavar="PATH", help="the socket at which clients ask for guests"
    )
    parser.add_argument(
        "--dir",
        metavar="DIR",
        help="directory of the monitors (default: SOCKET.guests, removed at the end)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=_LIMIT,
        metavar="N",
        help=f"number of guests that clients may have at the same time (default: {_LIMIT})",
    )
    parser.add_argument(
        "--keep", action="store_true", help="let the guests of a client that hangs up go on"
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

    return run_interruptible(_pool(args, inherited_descriptors()))


async def _pool(args: argparse.Namespace, fds: tuple[int, ...]) -> Outcome:
    import asyncio

    from pyqmigrate.vm.pool.pool import Pool
    from pyqmigrate.vm.pool.server import PoolServer

    directory = args.dir or f"{args.socket}.guests"
    pool = Pool(
        args.snapshot,
        args.command or None,
        args.ready,
        directory=directory,
        limit=args.limit,
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
    async with pool, PoolServer(pool, args.socket, keep=args.keep) as server:
        end = asyncio.Event()
        for number in ending_signals():
            asyncio.get_running_loop().add_signal_handler(number, end.set)
        announce(args, _data(pool, server, args), _lines(pool, server))
        async with store_messages_shown([pool]):
            await end.wait()
    if args.dir is None:
        with contextlib.suppress(OSError):  # it has files of the guests
            os.rmdir(directory)  # made by a pool that was killed
    return ended()


def _data(pool: Pool, server: PoolServer, args: argparse.Namespace) -> dict[str, object]:
    report = pool.report
    return {
        "socket": str(server.path),
        "directory": str(pool.directory),
        "pid": os.getpid(),
        "ready": args.ready,
        "limit": args.limit,
        "keep": args.keep,
        "runs": pool.runs,
        "mode": str(report.mode),
        "why": report.why,
        "machine": report.machine,
        "qemu": report.qemu,
        "start_seconds": report.start_seconds,
        "load_seconds": report.load_seconds,
        "total_seconds": report.total_seconds,
        "notes": list(report.notes),
    }


def _lines(pool: Pool, server: PoolServer) -> list[str]:
    report = pool.report
    return [
        f"pool   {counted(len(pool.ready), 'guest')} ready, mode {report.mode}: {printable(report.why)}",
        f"socket {printable(str(server.path))}",
        f"guests {printable(report.machine)}, QEMU {report.qemu}, monitors in "
        f"{printable(str(pool.directory))}",
        *(f"note   {printable(note)}" for note in report.notes),
    ]
