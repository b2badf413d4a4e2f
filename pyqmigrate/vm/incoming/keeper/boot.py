"""The program of a keeper: ``python -I -S -c "...boot import main" PACKAGES KIND SNAPSHOT PATHS...``.

The first page server is forked before anything else is imported: its imports are what a guest waits for
longest, and they go on beside those of the keeper. SNAPSHOT is there for people who read a list of
processes.
"""

from __future__ import annotations

import os
import socket
import sys

__all__ = ["SERVER", "keep", "main"]

SERVER = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from pyqmigrate.vm.incoming.keeper.preloaded import main; main()"
)


def main() -> None:
    """Keep the restore whose parent is standard input."""
    keep(sys.argv[1:])


def keep(words: list[str]) -> None:
    """As :func:`main`, with the arguments ``words``. This process must have a single thread."""
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        _become_server(theirs.fileno(), writer, words)
    theirs.close()
    os.close(writer)
    from pyqmigrate.vm.incoming.keeper.keeper import Keeper, ignore_signals
    from pyqmigrate.vm.incoming.keeper.server import ServerProcess, ServerProgram

    ignore_signals()
    command = [sys.executable, "-I", "-S", "-c", SERVER, *words]
    first = ServerProcess(pid, ours, reader)
    Keeper(socket.socket(fileno=0), ServerProgram(command), first).run()


def _become_server(control: int, errors: int, words: list[str]) -> None:
    """Serve, with the control channel as standard input. Ends the process."""
    try:
        os.setsid()
        os.dup2(control, 0)
        os.dup2(errors, 2)
        os.closerange(3, max(control, errors) + 1)  # the keeper's
        from pyqmigrate.vm.incoming.keeper.preloaded import serve

        serve(words[1], words[3:])
    finally:
        os._exit(1)
