"""Serve a snapshot's pages to a QEMU that runs before its memory is there: the source of a post-copy
migration.

QEMU is started with the options of the snapshot's guest, -S and -incoming defer; then, by QMP:
migrate-set-capabilities postcopy-ram on, migrate-incoming unix:PATH. SNAPSHOT can have any form: a
mapped-ram file, a sequential stream, an increment, a compact file, STORE#NAME. The guest can be continued
as soon as its devices are loaded. The command ends when QEMU has all pages.

A page that cannot be read or differs from the seal is never sent: the guest waits at it, and the error
names it. It is read again from time to time. If the connection breaks, QEMU pauses the migration; after
migrate-recover unix:PATH, --resume goes on, also from another copy of the snapshot.

JSON: ``snapshot``, ``seconds``, ``complete`` (whether QEMU has all pages), ``data_pages``, ``pages_left``,
``pages_withheld``, ``pages_sent``, ``requests``, ``mean_latency``, ``longest_latency`` and ``damaged_pages``.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import time
from pathlib import Path
from typing import Any

from pyqmigrate.cli.arguments import Parser, Verbs, add_verb
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.outcome import Outcome, counted, printable
from pyqmigrate.cli.sizes import read_size
from pyqmigrate.errors import UsageError, target_error
from pyqmigrate.io.place import absolute
from pyqmigrate.io.socket_path import SocketPath
from pyqmigrate.page_server.options import Ending, Push
from pyqmigrate.page_server.serving import ServeRequest, serve
from pyqmigrate.page_server.status_socket import StatusSocket

__all__ = ["add_parser"]

_DAMAGES = 100
# Keys of single events; all others are the status.
_OF_EVENTS = (
    "event",
    "block",
    "page",
    "pages",
    "demand",
    "error",
    "status",
    "complete",
    "resumed",
    "recoverable",
)


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "page-server", _run, __doc__)
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="a snapshot of any form")
    parser.add_argument(
        "--socket", metavar="PATH", required=True, help="the UNIX socket at which QEMU listens"
    )
    parser.add_argument("--resume", action="store_true", help="go on after a connection that broke")
    _add_order(parser)
    parser.add_argument(
        "--host-pages",
        metavar="BLOCK=SIZE",
        action="append",
        default=[],
        help="page size of QEMU's memory for a block, if it is not 4096, such as pc.ram=2M",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare what is read with the seal"
    )
    parser.add_argument(
        "--status-socket",
        metavar="PATH",
        help="a UNIX socket to make: who connects gets the status, as a line of JSON",
    )


def _add_order(parser: Parser) -> None:
    parser.add_argument(
        "--push",
        choices=[str(push) for push in Push],
        default="idle",
        help="when pages are sent that the guest has not asked for: if it waits for none (default), "
        "always, never",
    )
    parser.add_argument(
        "--working-set", metavar="FILE", help="pages to send first: a recorded working set"
    )
    parser.add_argument(
        "--record",
        metavar="FILE",
        help="write the pages that the guest asks for, in order; the rest is held back until then",
    )


def _run(args: argparse.Namespace) -> Outcome:
    request = ServeRequest(
        args.snapshot,
        _host_pages(args.host_pages),
        args.resume,
        Push(args.push),
        args.working_set,
        args.record,
        not args.no_check,
    )
    events = _Events(quiet=args.quiet)
    with contextlib.ExitStack() as stack:
        if args.status_socket:
            path = Path(absolute(args.status_socket))
            stack.enter_context(StatusSocket(path, lambda: events.status))
        ending = serve(request, lambda: _connect(events, args.socket), events.take)
    return _outcome(args.snapshot, ending, events)


class _Events:
    """What the server reports. ``status`` is the last of it."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self.started = time.monotonic()
        self.status: dict[str, Any] = {}
        self.damages: list[str] = []

    def take(self, event: dict[str, Any]) -> None:
        if event["event"] == "damage":
            if len(self.damages) < _DAMAGES:
                self.damages.append(event["error"])
            if not self._quiet and sys.stderr is not None:
                print(f"pyqmigrate: {printable(event['error'])}", file=sys.stderr, flush=True)
        if "pages_left" in event:  # not all tell how far it is
            self.status = {key: value for key, value in event.items() if key not in _OF_EVENTS}


def _connect(events: _Events, path: str) -> socket.socket:
    events.started = time.monotonic()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with SocketPath(Path(absolute(path))) as name:
            connection.connect(name.path)
    except OSError as error:
        connection.close()
        raise target_error(error, "cannot connect to QEMU", path) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _host_pages(given: list[str]) -> dict[str, int]:
    found = {}
    for text in given:
        block, separator, size = text.rpartition("=")
        if not (block and separator):
            raise UsageError(f"--host-pages must be BLOCK=SIZE, not {text!r}")
        try:
            found[block] = read_size(size)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise UsageError(f"--host-pages {text}: {error}") from error
    return found


def _outcome(snapshot: str, ending: Ending, events: _Events) -> Outcome:
    complete = ending is Ending.DONE
    status = dict(events.status)
    end_sent = status.pop("end_sent", complete)
    data = {
        "snapshot": snapshot,
        "seconds": time.monotonic() - events.started,
        "complete": complete,
        **status,
        "damaged_pages": events.damages,
    }
    if complete:
        what = "QEMU has all pages"
    elif end_sent:
        what = (
            "the connection broke after the last page: QEMU has all pages if query-migrate says "
            "completed; otherwise give it migrate-recover, and go on with --resume"
        )
    else:
        what = (
            f"the connection broke with {counted(status['pages_left'], 'page')} left: give QEMU "
            "migrate-recover, and go on with --resume"
        )
    line = (
        f"{printable(snapshot)}: {what}; {counted(status['pages_sent'], 'page')} sent, "
        f"{counted(status['requests'], 'request')}, {status['mean_latency'] * 1e6:.0f} us on average"
    )
    code = ExitCode.DONE if complete else ExitCode.BAD if events.damages else ExitCode.GUEST
    return Outcome(data, [line], code)
