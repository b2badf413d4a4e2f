"""A session with a monitor of QEMU that does not wait for its answers."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from pyqmigrate.vm.incoming.keeper.lines import Lines

__all__ = ["KeeperMonitor"]

_TAKEN_OVER = 1 << 20  # its ids are lower
_Answer = Callable[[dict[str, Any]], None]


class KeeperMonitor(Lines):
    """A session with QEMU's monitor, with out-of-band commands. Commands are answered by callbacks."""

    def __init__(self, connection: socket.socket, ready: Callable[[], None]) -> None:
        super().__init__(connection)
        self._answers: dict[int, _Answer] = {}
        self._number = 0
        self._ready = ready
        self.usable = False
        self.out_of_band = False

    def take_over(self) -> None:
        """Go on with a session that another process has negotiated, out-of-band commands included."""
        self._number = _TAKEN_OVER
        self.out_of_band = self.usable = True
        self._ready()

    def execute(
        self, command: str, arguments: dict[str, Any], answer: _Answer, *, oob: bool = False
    ) -> None:
        """Send a command; ``answer`` gets QEMU's reply, with ``return`` or ``error``."""
        self._number += 1
        self._answers[self._number] = answer
        key = "exec-oob" if oob and self.out_of_band else "execute"
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
            if "QMP" in line:
                self.out_of_band = "oob" in line["QMP"].get("capabilities", [])
                enabled = ["oob"] * self.out_of_band
                self.execute("qmp_capabilities", {"enable": enabled}, self._negotiated)
            elif line.get("id") in self._answers:
                self._answers.pop(line["id"])(line)

    def _negotiated(self, reply: dict[str, Any]) -> None:
        if "return" in reply:
            self.usable = True
            self._ready()
        else:
            self.closed = True
