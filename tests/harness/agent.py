"""A guest agent's end of its channel, speaking qemu-ga's protocol over a UNIX socket."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any, Self

__all__ = ["Agent"]


class Agent:
    """Listens at ``path`` and answers as qemu-ga does; ``times`` are what it was told to set.

    ``before`` is what is in the channel when a client comes: the rest of an answer to another.
    ``refuses`` makes guest-set-time an error; ``silent`` answers nothing; ``says`` is sent instead
    of the answer to the first command.
    """

    def __init__(
        self,
        path: Path,
        *,
        before: bytes = b"",
        refuses: bool = False,
        silent: bool = False,
        says: bytes | None = None,
    ) -> None:
        self.times: list[int] = []
        self._before, self._refuses, self._silent, self._says = before, refuses, silent, says
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            with client, client.makefile("rb") as lines:
                client.sendall(self._before)
                for line in lines:
                    if self._silent:
                        continue
                    if self._says is not None:
                        client.sendall(self._says)
                        continue
                    # A delimiter before a command empties the agent's own parser.
                    client.sendall(self._answer(json.loads(line.rpartition(b"\xff")[2])))

    def _answer(self, request: dict[str, Any]) -> bytes:
        name, arguments = request["execute"], request.get("arguments", {})
        if name == "guest-sync-delimited":
            return b"\xff" + json.dumps({"return": arguments["id"]}).encode() + b"\n"
        if name != "guest-set-time":
            return _error("CommandNotFound", f"The command {name} has not been found")
        if self._refuses:
            return _error("GenericError", "Failed to set time to guest: Operation not permitted")
        self.times.append(arguments["time"])
        return b'{"return": {}}\n'


def _error(kind: str, desc: str) -> bytes:
    return json.dumps({"error": {"class": kind, "desc": desc}}).encode() + b"\n"
