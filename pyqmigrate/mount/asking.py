"""Questions to a keeper and its answers: JSON objects, one in a line, over a socket.

A question is ``{"ask": NAME, ...}``. The answer is an object; ``{"error": {...}}`` if it failed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from pyqmigrate.errors import NotSupported, PyqmigrateError, TargetError, UsageError, target_error

__all__ = [
    "Answers",
    "Asking",
    "KeeperClient",
    "Listener",
    "Object",
    "connect",
    "error_object",
    "error_of",
    "listen",
    "peer_of",
]

Object: TypeAlias = dict[str, Any]
Answers: TypeAlias = Mapping[str, Callable[[Object], Object]]

_QUESTION_MAX = 64 << 20  # bytes: a list to push has a million ranges at most
_CHUNK = 1 << 16
_SEND_LIMIT = 5.0  # seconds
_CREDENTIALS = struct.Struct("=iII")
_CLIENTS_MAX = 16
_KINDS: dict[str, type[PyqmigrateError]] = {"UsageError": UsageError, "NotSupported": NotSupported}


class Asking:
    """A client of the keeper."""

    def __init__(self, connection: socket.socket, answers: Answers) -> None:
        self._socket = connection
        self._answers = answers
        self._received = bytearray()
        self._socket.settimeout(_SEND_LIMIT)

    def fileno(self) -> int:
        return self._socket.fileno()

    def take(self) -> bool:
        """Read what came and answer whole questions. Return False if the client is gone."""
        try:
            received = self._socket.recv(_CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._received += received
        if not received or len(self._received) > _QUESTION_MAX:
            return False
        while b"\n" in received and (end := self._received.find(b"\n")) >= 0:
            line = bytes(self._received[:end])
            del self._received[: end + 1]
            if not self.send(self._answer(line)):
                return False
        return True

    def send(self, answer: Object) -> bool:
        """Send an object. Return False if the client does not take it."""
        try:
            self._socket.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._socket.close()

    def _answer(self, line: bytes) -> Object:
        try:
            question = json.loads(line)
            name = question["ask"]
            answer = self._answers[name]
        except (ValueError, KeyError, TypeError, RecursionError):
            return {"error": {"type": "UsageError", "message": "not a question to this keeper"}}
        try:
            return answer(question)
        except (OSError, PyqmigrateError) as error:
            return {"error": error_object(error)}
        except (ValueError, KeyError, TypeError) as error:
            return {"error": {"type": "UsageError", "message": f"{name}: {error!r}"}}


class Listener:
    """A socket for clients of this user and of root."""

    def __init__(self, listening: socket.socket, answers: Answers) -> None:
        self._socket = listening
        self._answers = answers
        self._socket.setblocking(False)
        self.clients: dict[int, Asking] = {}

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> Asking | None:
        """Return a new client; None if there is none, or it must not ask."""
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return None
        _, uid = peer_of(connection)
        if uid not in (0, os.geteuid()) or len(self.clients) >= _CLIENTS_MAX:
            connection.close()
            return None
        client = Asking(connection, self._answers)
        self.clients[client.fileno()] = client
        return client

    def close(self) -> None:
        for client in self.clients.values():
            client.close()
        self._socket.close()


class KeeperClient:
    """The other side: asks a keeper. Owns the socket.

    ``on_message`` gets the messages that a keeper sends on its own account to who follows it.
    ``keeper`` is its process, once it is known.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.on_message: Callable[[str], None] = lambda text: None
        self.keeper = 0
        self._socket = connection
        self._file = connection.makefile("rb")

    def ask(self, name: str, *, limit: float | None = 10.0, **more: object) -> Object:
        """Return the answer to a question, within ``limit`` seconds.

        Raises TargetError if the keeper does not answer, and the error that it answers with.
        """
        try:
            self._socket.settimeout(limit)
            self._socket.sendall(json.dumps({"ask": name, **more}).encode() + b"\n")
        except OSError as error:
            raise target_error(error, "the keeper of the mount does not answer") from error
        return self.wait(limit)

    def wait(self, limit: float | None) -> Object:
        """Return the next object that the keeper sends. Raises as :meth:`ask` does."""
        while True:
            try:
                self._socket.settimeout(limit)
                line = self._file.readline()
                answer = json.loads(line) if line else None
            except TimeoutError as error:
                text = "the keeper of the mount does not answer"
                raise TargetError(errno.ETIMEDOUT, text) from error
            except (OSError, ValueError):
                answer = None
            if not isinstance(answer, dict):
                raise TargetError(errno.ECONNRESET, "the keeper of the mount has ended")
            if "message" not in answer:
                break
            self.on_message(str(answer["message"]))
        if "error" in answer:
            raise error_of(answer["error"])
        return answer

    @property
    def closed(self) -> bool:
        return self._file.closed

    @property
    def pid(self) -> int:
        """The process at the other end."""
        return peer_of(self._socket)[0]

    def close(self) -> None:
        """Close it. Idempotent."""
        self._file.close()
        self._socket.close()


def listen(device: int) -> socket.socket | None:
    """Return a listening socket for the keeper of a mount; None if the name is taken."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(_address(device))
        listening.listen(_CLIENTS_MAX)
    except OSError:
        listening.close()
        return None
    return listening


def connect(device: int, uid: int) -> KeeperClient | None:
    """Return a connection to the keeper of the mount with this st_dev, which user ``uid`` runs; None
    if nobody answers."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(OSError):
        connection.settimeout(_SEND_LIMIT)
        connection.connect(_address(device))
        if peer_of(connection)[1] in (0, uid):  # anybody can take an abstract name
            return KeeperClient(connection)
    connection.close()
    return None


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return process and user at the other end of a UNIX socket."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


def error_object(error: Exception) -> Object:
    """Return an exception as an object of an answer."""
    name = getattr(error, "filename", None)
    return {
        "type": type(error).__name__,
        "message": str(getattr(error, "strerror", None) or error),
        "errno": getattr(error, "errno", None),
        "filename": None if name is None else os.fsdecode(name),
    }


def error_of(answer: Object) -> PyqmigrateError:
    """Return the exception of an answer."""
    message = str(answer.get("message", "it failed"))
    kind = _KINDS.get(str(answer.get("type")))
    if kind is not None:
        return kind(message)
    number = answer.get("errno")
    error = TargetError(
        number if isinstance(number, int) else errno.EIO, "", answer.get("filename")
    )
    error.strerror = message
    return error


def _address(device: int) -> bytes:
    """Return an abstract name: the kernel removes it with the socket."""
    return f"\0pyqmigrate-mount-{os.major(device)}-{os.minor(device)}".encode()
