"""Be a QMP server in front of memory that is kept in files.

A manager drives QEMU's file migration here without QEMU: this memory is saved to snapshots that
QEMU loads, and what QEMU saved is loaded into it. Example:

    pyqmigrate serve --qmp vm.qmp --ram pc.ram=/dev/shm/guest-ram,size=1G

Ctrl-C, SIGTERM, SIGHUP and the command quit end the server, with exit code 0; a save that runs then
is cancelled. It leaves nothing behind at a path; a file that was handed in, or has an offset, keeps
a part that is recognisable by its zero magic.

The socket is made with mode 0600, and only this user and root may connect.

When clients can connect, a line says so on standard error: ``pyqmigrate: listening on unix:PATH``.

JSON, when the server has ended: ``qmp``, the socket; ``total_ram``; ``incoming``, the status of
the incoming migration, null without --incoming. The exit code is 4 when that failed.
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
        "--qmp", required=True, metavar="SOCKET", help="where clients connect: PATH or unix:PATH"
    )
    parser.add_argument(
        "--ram",
        required=True,
        action="append",
        metavar="NAME=FILE[,size=SIZE]",
        help="a RAM block and the file it lives in; made, or made longer, when a size (whole pages "
        "of 4 KiB) is given",
    )
    parser.add_argument(
        "--machine", default="", metavar="TYPE", help="machine type written into snapshots"
    )
    parser.add_argument("--uuid", type=UUID, help="the guest's, for the capability validate-uuid")
    parser.add_argument(
        "--incoming", metavar="defer|URI", help="wait for a migration, or load this one at once"
    )
    parser.add_argument(
        "--compat",
        nargs="?",
        const="10.0",
        choices=sorted(_COMPAT),
        metavar="10.0|11.1",
        help="imitate QEMU 10.0.2 or 11.1.3, texts and quirks (10.0 when no version is given); "
        "without it, what QEMU fails on later is refused at once",
    )


def _run(args: argparse.Namespace) -> Outcome:
    path = str(monitor_path(args.qmp))
    blocks = [_read_block(text) for text in args.ram]
    with contextlib.ExitStack() as stack:
        migration = Migration(
            [_open_block(*given, stack) for given in blocks],
            machine=args.machine,
            uuid=args.uuid,
            policy=Policy.STRICT if args.compat is None else _COMPAT[args.compat],
            incoming=args.incoming is not None,
            # What a manager finds when it connects to QEMU; a library's own default is no limit.
            parameters=Parameters(),
        )
        stack.callback(migration.close)
        failed = run_interruptible(_serve(migration, path, args.incoming, quiet=args.quiet))
        incoming = None if args.incoming is None else str(migration.query().status)
        data = {"qmp": path, "total_ram": migration.memory_size(), "incoming": incoming}
    lines = ["the incoming migration failed: " + migration.query().error] if failed else []
    return Outcome(data, lines, ExitCode.GUEST if failed else ExitCode.DONE)


async def _serve(migration: Migration, path: str, incoming: str | None, *, quiet: bool) -> bool:
    """Serve until somebody asks for the end; whether that was a failed incoming migration."""
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
        ends = [asyncio.ensure_future(e.wait()) for e in (server.quit_requested, failed)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for waiting in ends:
            waiting.cancel()
        await asyncio.to_thread(migration.close)
    return failed.is_set()


def _read_block(text: str) -> tuple[str, str, int | None]:
    """Name, file and length of a RAM block; None for the length that the file has."""
    name, equals, rest = text.partition("=")
    path, comma, size = rest.rpartition(",size=")
    if not comma:
        path, size = rest, ""
    if not equals or not name or not path or (comma and not size):
        raise UsageError(f"--ram is {text!r}; it is NAME=FILE[,size=SIZE]")
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
    """A block in its file, which is made or made longer where a length is given. A file that cannot
    be made so long is left as it was."""
    try:
        fd, made = _open_memory(path, make=length is not None)
        stack.callback(os.close, fd)
        try:
            if length is not None:
                os.ftruncate(fd, max(length, os.fstat(fd).st_size))
        except OSError:
            if made:
                Path(path).unlink()
            raise
    except OSError as error:
        raise target_error(error, "cannot open the memory", path) from error
    return RamBlock(name, FileMemory(fd, length=length))


def _open_memory(path: str, *, make: bool) -> tuple[int, bool]:
    """The file at ``path``, and whether it was made now."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(path, flags), False
    except FileNotFoundError:
        if not make:
            raise
    return os.open(path, flags | os.O_CREAT, 0o600), True
