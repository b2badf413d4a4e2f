"""A session with QEMU's monitor without an event loop, for the start of a guest.

    monitor = BlockingMonitor(connection)
    monitor.ask("query-kvm")                     # as early as the process exists
    run_blocking(monitor.execute("query-kvm"))   # waits for the answer

Commands can be sent before QEMU greets: it answers all of them as soon as its monitor works, in their
order. Another process may go on with the session later.

QEMU reads its monitors byte by byte, 10 us each while the host is busy: so the lines are short.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pyqmigrate.errors import QemuError, QemuGone, QemuRefused

__all__ = ["BlockingMonitor"]

_TIMEOUT = 60.0  # seconds; QEMU may have large files to open
_LINE_MAX = 1 << 26  # bytes


class BlockingMonitor:
    """A session over ``connection``, which is borrowed, with out-of-band commands enabled: those of
    :class:`~pyqmigrate.vm.qemu.commands.Commands`. ``answered_at`` is the time of the greeting
    (``time.monotonic``), None before."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = bytearray()
        self._number = 0
        self._asked: dict[str, int] = {}
        self._replies: dict[int, dict[str, Any]] = {}  # by the number of the command
        self._version = (0, 0, 0)
        self.answered_at: float | None = None
        self._enabled = self._send("qmp_capabilities", {"enable": ["oob"]})

    @property
    def version(self) -> tuple[int, int, int]:
        return self._version

    def ask(
        self, command: str, arguments: Mapping[str, object] | None = None, fds: Sequence[int] = ()
    ) -> None:
        """Send a command now, whose answer :meth:`execute` returns then, each time it is called with it.

        ``fds`` come along; QEMU keeps those of the latest command only. Raises QemuGone.
        """
        key = _key(command, arguments)
        if fds or key not in self._asked:
            self._asked[key] = self._send(command, arguments, fds)

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float | None = _TIMEOUT,
    ) -> Any:
        """Run a command, unless it was asked before, and return its result. Blocks.

        Raises QemuRefused when QEMU answers with an error, QemuGone when it hung up, QemuError when
        it does not answer.
        """
        number = self._asked.get(_key(command, arguments))
        if number is None:
            number = self._send(command, arguments)
        return self._result(number, command, timeout)

    async def pause(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    async def hmp(self, line: str) -> str:
        """Run ``line`` in the human monitor and return its output. Blocks."""
        return str(await self.execute("human-monitor-command", {"command-line": line}))

    def negotiate(self) -> None:
        """Wait for the greeting. Raises as :meth:`execute`."""
        self._result(self._enabled, "qmp_capabilities")

    def _send(
        self, command: str, arguments: Mapping[str, object] | None, fds: Sequence[int] = ()
    ) -> int:
        self._number += 1
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = dict(arguments)
        line = json.dumps(request, separators=(",", ":")).encode() + b"\n"
        self._connection.settimeout(_TIMEOUT)
        try:
            sent = socket.send_fds(self._connection, [line], list(fds)) if fds else 0
            self._connection.sendall(line[sent:], socket.MSG_NOSIGNAL)
        except TimeoutError as error:
            raise QemuError(f"QEMU has not taken {command} within {_TIMEOUT:g} s") from error
        except OSError as error:
            raise QemuGone(f"QEMU hung up on {command}: it ended, or was killed") from error
        return self._number

    def _result(self, number: int, command: str, timeout: float | None = _TIMEOUT) -> Any:
        self._connection.settimeout(timeout)
        while number not in self._replies:
            self._receive(command)
        reply = self._replies[number]
        if "error" in reply:
            error = reply["error"]
            raise QemuRefused(command, str(error.get("desc")), str(error.get("class")))
        return reply.get("return")

    def _receive(self, command: str) -> None:
        try:
            data = self._connection.recv(1 << 16)
        except TimeoutError as error:
            raise QemuError(f"QEMU has not answered {command} within {_TIMEOUT:g} s") from error
        except OSError:
            data = b""
        if not data:
            raise QemuGone(f"QEMU hung up on {command}: it ended, or was killed")
        self._received += data
        *lines, rest = self._received.split(b"\n")
        self._received = rest
        if len(rest) > _LINE_MAX:
            raise QemuError(f"QEMU's answer to {command} is too long")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        if "QMP" in line:
            self.answered_at = time.monotonic()
            version = line["QMP"]["version"]["qemu"]
            self._version = (version["major"], version["minor"], version["micro"])
        elif "event" not in line:
            self._replies[len(self._replies) + 1] = line


def _key(command: str, arguments: Mapping[str, object] | None) -> str:
    return json.dumps([command, dict(arguments or {})])
