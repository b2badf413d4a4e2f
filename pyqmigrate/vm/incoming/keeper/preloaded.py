"""A page server that has imported everything before it is told what to serve.

Its standard input is the control channel (:mod:`pyqmigrate.page_server.control`), on which its order comes
first: a line with ``words``, the options of ``python -m pyqmigrate.page_server``, and ``snapshot``, a name or the
index of a descriptor. The descriptors that come along are the connection to QEMU and those of the
snapshot's files.
"""

from __future__ import annotations

import array
import importlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Sequence

__all__ = ["main", "serve"]

_FDS_MAX = 16


def main() -> None:
    """Serve; the arguments are those of :mod:`pyqmigrate.vm.incoming.keeper.boot`."""
    serve(sys.argv[2], sys.argv[4:])


def serve(kind: str, paths: Sequence[str]) -> None:
    """Import the server for a ``kind`` of source (the module's name), wait for the order, and serve.

    ``paths`` are the import path. Ends the process.
    """
    sys.path[:] = paths
    status = 1
    try:
        program = importlib.import_module("pyqmigrate.page_server.__main__")
        importlib.import_module(f"pyqmigrate.page_server.{kind}")
        control = socket.socket(fileno=os.dup(0))
        os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
        order = _receive(control)
        if order is not None:
            words, fds = order
            options = ["--fd", str(fds[0]), "--control", str(control.detach())]
            status = program.main([*words, *options])
    except SystemExit as end:  # argparse
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def _receive(control: socket.socket) -> tuple[list[str], list[int]] | None:
    """Return the options and the descriptors; None if the keeper has ended. What follows stays in the
    socket."""
    size = array.array("i").itemsize
    start, ancillary, _, _ = control.recvmsg(
        1, socket.CMSG_SPACE(_FDS_MAX * size), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // size * size])
    line = start
    while line and not line.endswith(b"\n"):
        ahead = control.recv(65536, socket.MSG_PEEK)
        if not ahead:
            return None
        line += control.recv(ahead.find(b"\n") + 1 or len(ahead))
    if not line:
        return None
    order = json.loads(line)
    snapshot = order["snapshot"]
    if isinstance(snapshot, int):
        snapshot = f"/proc/self/fd/{fds[1 + snapshot]}"
    return [*order["words"], "--snapshot", snapshot], list(fds)
