"""Run a QMP server for QEMU's file migration, with memory that is kept in files.

A manager can drive QEMU's file migration without a QEMU: the memory is saved to snapshots that QEMU
loads, and snapshots by QEMU are loaded into it. Example:

    pyqmigrate serve --qmp vm.qmp --ram pc.ram=/dev/shm/guest-ram,size=1G

Ctrl-C, SIGTERM, SIGHUP and the command quit end the server with exit code 0, and cancel a running save.
A cancelled save to a path leaves nothing. In a file that was passed as a descriptor, or that has an
offset, it leaves a partial file with a zero magic.

The socket has mode 0600, and only this user and root may connect. When clients can connect, the server
prints a line to standard error: ``pyqmigrate: listening on unix:PATH``.

JSON, when the server has ended: ``qmp``, the socket; ``total_ram``; ``incoming``, the status of the
incoming migration, null without --incoming. The exit code is 4 if that migration failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from pathlib import Path
from uuid import UUID

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.contents import PAGE
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.interruption import ending_signals, run_interruptible
from pyqmigrate.cli.outcome import Outcome, printable
from pyqmigrate.cli.sizes import read_size
from pyqmigrate.errors import UsageError, target_error
from pyqmigrate.io.memory import FileMemory, RamBlock
from pyqmigrate.migration import Migration
from pyqmigrate.qapi.address import parse_uri
from pyqmigrate.qapi.monitor_address import monitor_path
from pyqmigrate.qapi.parameters import Parameters
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qmp import QmpServer

__all__ = ["add_parser"]

_COMPAT = {"10.0": Policy.COMPAT_10_0, "11.1": Policy.COMPAT_11_1}


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "serve", _run, __doc__)
    parser.add_argument(
        "--qmp", required=True, metavar="SOCKET", help="the socket for clients: PATH or unix:PATH"
    )
    parser.add_argument(
        "--ram",
        required=True,
        action="append",
        metavar="NAME=FILE[,size=SIZE]",
        help="a RAM block and its file; with a size (whole pages of 4 KiB) the file is created or "
        "extended; can be given several times",
    )
    parser.add_argument(
        "--machine", default="", metavar="TYPE", help="machine type to record in snapshots"
    )
    parser.add_argument(
        "--uuid", type=UUID, help="the guest's UUID, for the capability validate-uuid"
    )
    parser.add_argument(
        "--incoming", metavar="defer|URI", help="wait for a migration, or load this one at once"
    )
    parser.add_argument(
        "--compat",
        nargs="?",
        const="10.0",
        choices=sorted(_COMPAT),
        metavar="10.0|11.1",
        help="imitate QEMU 10.0.2 or 11.1.3 with its texts and quirks (without a version: 10.0); "
        "without --compat, errors that QEMU reports late are reported at once",
    )


def _run(args: argparse.Namespace) -> Outcome:
    path = str(monitor_path(args.qmp))
    blocks = [_read_block(text) for text in args.ram]
    with contextlib.ExitStack() as stack:
        migration = Migration(
            [_open_block(*block, stack) for block in blocks],
            machine=args.machine,
            uuid=args.uuid,
            policy=Policy.STRICT if args.compat is None else _COMPAT[args.compat],
            incoming=args.incoming is not None,
            # QEMU's defaults, which a manager expects; the library's own have no bandwidth limit.
            parameters=Parameters(),
        )
        stack.callback(migration.close)
        failed = run_interruptible(_serve(migration, path, args.incoming, quiet=args.quiet))
        incoming = None if args.incoming is None else str(migration.query().status)
        data = {"qmp": path, "total_ram": migration.memory_size(), "incoming": incoming}
    lines = ["the incoming migration failed: " + migration.query().error] if failed else []
    return Outcome(data, lines, ExitCode.GUEST if failed else ExitCode.DONE)


async def _serve(migration: Migration, path: str, incoming: str | None, *, quiet: bool) -> bool:
    """Serve until the end is requested; return whether an incoming migration failed."""
    loop = asyncio.get_running_loop()
    failed = asyncio.Event()

    def end() -> None:
        loop.call_soon_threadsafe(failed.set)

    migration.on_exit = end
    async with QmpServer(migration, migration.fdsets, policy=migration.policy) as server:
        for number in ending_signals():
            loop.add_signal_handler(number, server.quit_requested.set)
        await server.listen(path)
        if not quiet and sys.stderr is not None:
            print(f"pyqmigrate: listening on unix:{printable(path)}", file=sys.stderr, flush=True)
        if incoming is not None and incoming != "defer":
            address = parse_uri(incoming)
            await asyncio.to_thread(migration.migrate_incoming, address)
        events = (server.quit_requested, failed)
        tasks = [asyncio.ensure_future(event.wait()) for event in events]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.to_thread(migration.close)
    return failed.is_set()


def _read_block(text: str) -> tuple[str, str, int | None]:
    """Return name, file and length of a RAM block; None is the length of the file."""
    name, equals, rest = text.partition("=")
    path, comma, size = rest.rpartition(",size=")
    if not comma:
        path, size = rest, ""
    if not equals or not name or not path or (comma and not size):
        raise UsageError(f"--ram must be NAME=FILE[,size=SIZE], not {text!r}")
    if not size:
        return name, path, None
    try:
        length = read_size(size)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--ram {text!r}: {error}") from None
    if not length or length % PAGE:
        raise UsageError(f"--ram {text!r}: the size of a RAM block is whole pages of {PAGE} bytes")
    return name, path, length


def _open_block(name: str, path: str, length: int | None, stack: contextlib.ExitStack) -> RamBlock:
    """Open a RAM block's file, and create or extend it if a length is given.

    If that fails, the file is left as it was.
    """
    try:
        fd, created = _open_memory(path, create=length is not None)
        stack.callback(os.close, fd)
        try:
            if length is not None:
                os.ftruncate(fd, max(length, os.fstat(fd).st_size))
        except OSError:
            if created:
                Path(path).unlink()
            raise
    except OSError as error:
        raise target_error(error, "cannot open the memory", path) from error
    return RamBlock(name, FileMemory(fd, length=length))


def _open_memory(path: str, *, create: bool) -> tuple[int, bool]:
    """Open the file at ``path``; return its descriptor, and whether it was created."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(path, flags), False
    except FileNotFoundError:
        if not create:
            raise
    return os.open(path, flags | os.O_CREAT, 0o600), True
