"""The program of a keeper: ``python -I -S -c "...boot import main" PACKAGES KIND SNAPSHOT PATHS...``.

The first page server is forked before anything else is imported: its imports are what a guest waits for
longest, and they go on beside those of the keeper. SNAPSHOT is there for people who read a list of
processes.
"""

from __future__ import annotations

import socket
import sys

from pyqmigrate.vm.incoming.keeper.server import ServerProgram

__all__ = ["SERVER", "main"]

SERVER = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from pyqmigrate.vm.incoming.keeper.preloaded import main; main()"
)


def main() -> None:
    """Keep the restore whose parent is standard input."""
    kind, paths = sys.argv[2], sys.argv[4:]
    first = ServerProgram.fork(lambda: _serve(kind, paths))
    from pyqmigrate.vm.incoming.keeper.keeper import Keeper, ignore_signals

    ignore_signals()
    command = [sys.executable, "-I", "-S", "-c", SERVER, *sys.argv[1:]]
    Keeper(socket.socket(fileno=0), ServerProgram(command), first).run()


def _serve(kind: str, paths: list[str]) -> None:
    from pyqmigrate.vm.incoming.keeper.preloaded import serve

    serve(kind, paths)
