"""A QMP client for tests: one request, one reply, over a UNIX socket."""

from __future__ import annotations

import array
import itertools
import json
import socket
import time
from pathlib import Path
from typing import Any, Self

__all__ = ["QmpClient", "QmpError", "migrate"]


class QmpError(Exception):
    """The server answered with an error."""

    def __init__(self, command: str, error: dict[str, str]) -> None:
        super().__init__(f"{command}: {error['class']}: {error['desc']}")
        self.error_class = error["class"]
        self.desc = error["desc"]


class QmpClient:
    """A negotiated session without out-of-band execution.

    A reply that does not come within ``timeout`` seconds is a TimeoutError; a server that hangs
    up is a ConnectionError.
    """

    def __init__(self, path: Path, timeout: float = 30.0) -> None:
        self.events: list[dict[str, Any]] = []
        self._received = b""
        self._ids = itertools.count(1)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(str(path))
            # What happens at that moment may be told first.
            while "event" in (message := self._next_message()):
                self.events.append(message)
            self.greeting: dict[str, Any] = message["QMP"]
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, fd: int | None = None
    ) -> Any:
        """Runs one command and returns what it returns; ``fd`` travels with it (SCM_RIGHTS).

        A server takes one descriptor a message, so nothing else is sent before the reply.
        """
        identity = next(self._ids)
        request: dict[str, Any] = {"execute": command, "id": identity}
        if arguments is not None:
            request["arguments"] = arguments
        rights = (
            []
            if fd is None
            else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]).tobytes())]
        )
        text = json.dumps(request).encode() + b"\n"
        sent = self._socket.sendmsg([text], rights)
        if sent < len(text):  # a QEMU that was told to quit may have hung up by now
            self._socket.sendall(text[sent:])
        while True:
            message = self._next_message()
            if "event" in message:
                self.events.append(message)
            elif message.get("id") == identity:
                if "error" in message:
                    raise QmpError(command, message["error"])
                return message["return"]

    def _next_message(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError("the QMP server hung up")
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message


def migrate(qmp: QmpClient, command: str, uri: str, *, mapped: bool) -> None:
    """Run ``migrate`` or ``migrate-incoming`` and wait until it has completed."""
    state = {"capability": "mapped-ram", "state": mapped}
    qmp.execute("migrate-set-capabilities", {"capabilities": [state]})
    qmp.execute("migrate-set-parameters", {"max-bandwidth": 0})
    qmp.execute(command, {"uri": uri})
    deadline = time.monotonic() + 60
    while (answer := qmp.execute("query-migrate"))["status"] != "completed":
        assert answer["status"] not in ("failed", "cancelled"), answer
        assert time.monotonic() < deadline, answer
        time.sleep(0.01)
