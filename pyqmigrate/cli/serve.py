"""Be a QMP server in front of memory that is kept in files.

A manager drives QEMU's file migration here without QEMU: this memory is saved to snapshots that
QEMU loads, and what QEMU saved is loaded into it. Ctrl-C, SIGTERM and the command quit end the
server, with exit code 0; a save that runs then is cancelled. It leaves nothing behind at a path; a
file that was handed in, or has an offset, keeps a part that is recognisable by its zero magic.

The socket is made with mode 0600, and only this user and root may connect.

JSON, when the server has ended: ``qmp``, the socket; ``memory_bytes``; ``incoming``, the status of
the incoming migration, null without --incoming. The exit code is 4 when that failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import signal
from pathlib import Path
from uuid import UUID

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.outcome import Outcome
from pyqmigrate.errors import TargetError, UsageError
from pyqmigrate.format.address import parse_uri
from pyqmigrate.format.uri import parse_size
from pyqmigrate.io.memory import FileMemory, RamBlock
from pyqmigrate.migration import Migration
from pyqmigrate.monitor import QmpServer
from pyqmigrate.options import Parameters, Policy

__all__ = ["add_parser"]

_COMPAT = {"10.0": Policy.COMPAT_10_0, "11.1": Policy.COMPAT_11_1}


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "serve", _run, __doc__)
    parser.add_argument("--qmp", required=True, metavar="unix:PATH", help="where clients connect")
    parser.add_argument(
        "--ram", required=True, action="append", metavar="NAME=FILE[,size=SIZE]",
        help="a RAM block and the file it lives in; made, or made longer, when a size is given",
    )
    parser.add_argument(
        "--machine", default="", metavar="TYPE", help="machine type written into snapshots"
    )
    parser.add_argument(
        "--uuid", type=UUID, help="the guest's, for the capability validate-uuid"
    )
    parser.add_argument(
        "--incoming", metavar="defer|URI", help="wait for a migration, or load this one at once"
    )
    parser.add_argument(
        "--compat", nargs="?", const="10.0", choices=sorted(_COMPAT), metavar="10.0|11.1",
        help="imitate QEMU 10.0.2 or 11.1.3, texts and quirks (10.0 when no version is given); "
        "without it, what QEMU fails on later is refused at once",
    )


def _run(args: argparse.Namespace) -> Outcome:
    path = _socket_path(args.qmp)
    with contextlib.ExitStack() as stack:
        migration = Migration(
            [_block(text, stack) for text in args.ram],
            machine=args.machine,
            uuid=args.uuid,
            policy=Policy.STRICT if args.compat is None else _COMPAT[args.compat],
            incoming=args.incoming is not None,
            # What a manager finds when it connects to QEMU; a library's own default is no limit.
            parameters=Parameters(),
        )
        stack.callback(migration.close)
        failed = asyncio.run(_serve(migration, path, args.incoming))
        incoming = None if args.incoming is None else str(migration.query().status)
        data = {"qmp": path, "memory_bytes": migration.memory_size(), "incoming": incoming}
    lines = ["the incoming migration failed: " + migration.query().error] if failed else []
    return Outcome(data, lines, ExitCode.GUEST if failed else ExitCode.DONE)


async def _serve(migration: Migration, path: str, incoming: str | None) -> bool:
    """Serve until somebody asks for the end; whether that was a failed incoming migration."""
    loop = asyncio.get_running_loop()
    failed = asyncio.Event()

    def end() -> None:
        loop.call_soon_threadsafe(failed.set)

    migration.on_exit = end
    async with QmpServer(migration, migration.fdsets, policy=migration.policy) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.quit_requested.set)
        await server.listen(path)
        if incoming is not None and incoming != "defer":
            address = parse_uri(incoming)
            await asyncio.to_thread(migration.migrate_incoming, address)
        ends = [asyncio.ensure_future(e.wait()) for e in (server.quit_requested, failed)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for waiting in ends:
            waiting.cancel()
        await asyncio.to_thread(migration.close)
    return failed.is_set()


def _socket_path(text: str) -> str:
    scheme, colon, path = text.partition(":")
    if scheme != "unix" or not colon or not path:
        raise UsageError(f"--qmp is {text!r}; it is unix:PATH")
    return path


def _block(text: str, stack: contextlib.ExitStack) -> RamBlock:
    name, equals, rest = text.partition("=")
    path, comma, size = rest.rpartition(",size=")
    if not comma:
        path, size = rest, ""
    if not equals or not name or not path:
        raise UsageError(f"--ram is {text!r}; it is NAME=FILE[,size=SIZE]")
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if size else 0)
    try:
        fd = os.open(path, flags, 0o600)
        stack.callback(os.close, fd)
        if size:
            os.ftruncate(fd, max(parse_size(size), Path(path).stat().st_size))
    except OSError as error:
        raise TargetError(error.errno or errno.EIO, "cannot open the memory", path) from error
    return RamBlock(name, FileMemory(fd, length=parse_size(size) if size else None))
