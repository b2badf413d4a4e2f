"""A page server as a process of its own: ``python -m pyqmigrate.page_server``.

    python -m pyqmigrate.page_server --fd 3 --control 4 --snapshot /snap/guest.mapped

It reports on the control socket (:mod:`pyqmigrate.page_server.control`), and its exit status is 0 if the
destination has everything, 1 otherwise. The last event of a failure is ``error``. There, ``class`` is the
name of the exception.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.page_server.control import Control
from pyqmigrate.page_server.options import Ending, Push
from pyqmigrate.page_server.serving import ServeRequest, serve

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; return the exit status."""
    args = _parser().parse_args(arguments)
    os.set_inheritable(args.fd, False)
    os.set_inheritable(args.control, False)
    # The guest lives longer than the terminal from which it was restored.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = Control(socket.socket(fileno=args.control))
    request = ServeRequest(
        args.snapshot,
        json.loads(args.host_pages),
        args.resume,
        Push(args.push),
        args.working_set,
        args.record,
        args.sealed,
        args.wait,
        args.base,
        args.offset,
        args.cache,
        args.expect,
        args.confirm_end,
    )
    try:
        ending = serve(request, socket.socket(fileno=args.fd), control.send, control)
    except (PyqmigrateError, OSError) as error:
        control.send(_error(error))
        return 1
    control.send({"event": "end", "how": ending.value})
    return 0 if ending is Ending.DONE else 1


def _error(error: Exception) -> dict[str, Any]:
    notes = "".join(getattr(error, "__notes__", ()))
    return {"event": "error", "class": type(error).__name__, "error": f"{notes}{error}"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pyqmigrate.page_server")
    parser.add_argument("--fd", type=int, required=True, help="the connected socket")
    parser.add_argument("--control", type=int, required=True, help="the socket of the parent")
    parser.add_argument("--snapshot", required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--push", choices=[str(push) for push in Push], default="idle")
    parser.add_argument("--working-set")
    parser.add_argument("--record")
    parser.add_argument("--host-pages", default="{}", help="JSON: page size in bytes by block")
    parser.add_argument("--no-seal", dest="sealed", action="store_false")
    parser.add_argument("--wait", action="store_true", help="until the parent says begin")
    parser.add_argument("--base", help="of an increment")
    parser.add_argument("--expect", help="digest of the state that the snapshot has to have")
    parser.add_argument("--offset", type=int, help="of the stream in the file")
    parser.add_argument("--confirm-end", action="store_true", help="send the end when told to")
    parser.add_argument("--cache", help="directory for the packs of a remote store")
    return parser


if __name__ == "__main__":
    sys.exit(main())
