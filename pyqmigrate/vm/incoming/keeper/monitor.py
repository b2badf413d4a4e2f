"""A session with a monitor of QEMU that does not wait for its answers."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from pyqmigrate.vm.incoming.keeper.lines import Lines

__all__ = ["KeeperMonitor"]

_Answer = Callable[[dict[str, Any]], None]


class KeeperMonitor(Lines):
    """A session that another process has negotiated, with out-of-band commands, and used without ids.

    Commands are answered by callbacks.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self._answers: dict[int, _Answer] = {}
        self._number = 0

    def execute(
        self, command: str, arguments: dict[str, Any], answer: _Answer, *, oob: bool = False
    ) -> None:
        """Send a command; ``answer`` gets QEMU's reply, with ``return`` or ``error``."""
        self._number += 1
        self._answers[self._number] = answer
        key = "exec-oob" if oob else "execute"
        self.send({key: command, "arguments": arguments, "id": self._number})

    def pass_fd(self, fd: int, name: str, answer: _Answer) -> None:
        """Give QEMU a descriptor, one at a time: only the latest that was not taken is kept."""
        try:
            socket.send_fds(self.connection, [b" "], [fd])
        except OSError:
            self.closed = True
            return
        self.execute("getfd", {"fdname": name}, answer)

    def take(self) -> None:
        """Handle what QEMU has sent."""
        for line in self.receive():
            if line.get("id") in self._answers:
                self._answers.pop(line["id"])(line)
