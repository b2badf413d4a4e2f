"""One client's conversation: greeting, negotiation, and an answer to every message.

It performs no input or output: a session is given values that were read, and returns values to be
written. So QMP's whole grammar can be tested without a socket.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import NamedTuple

from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.io.threads import starting_threads
from pyqmigrate.qapi import types as qapi
from pyqmigrate.qapi.event import Event
from pyqmigrate.qmp.commands import Context
from pyqmigrate.qmp.json_stream import JsonError, JsonValue

__all__ = ["Session", "event_message"]

_log = logging.getLogger(__name__)

_NEGOTIATION = "qmp_capabilities"
_GENERIC = "GenericError"
_NOT_FOUND = "CommandNotFound"


class _RefusedMessage(Exception):
    """A message that is answered with an error."""

    def __init__(self, text: str, kind: str = _GENERIC) -> None:
        super().__init__(text)
        self.kind = kind


class _Call(NamedTuple):
    command: str
    arguments: dict[str, object]
    out_of_band: bool


class Session:
    """The state of one connection. ``offered`` are the protocol's options: none, or ``oob``."""

    def __init__(self, context: Context, *, offered: tuple[str, ...] = ()) -> None:
        self._context = context
        self._offered = offered
        self._enabled: set[str] = set()
        self.negotiated = False
        """Whether the client has finished negotiation: events are for such clients only."""

    def greeting(self) -> dict[str, object]:
        """Return the first message to a new client."""
        version = self._context.version.to_json()
        return {"QMP": {"version": version, "capabilities": list(self._offered)}}

    async def answer(self, item: JsonValue | JsonError) -> dict[str, object]:
        """Execute a client's message and return the reply."""
        if isinstance(item, JsonError):
            return _failure(item.text, _GENERIC)
        identity: dict[str, object] = {}
        try:
            if not isinstance(item.value, dict):
                raise _RefusedMessage("QMP input must be a JSON object")
            if "id" in item.value:
                identity["id"] = item.value["id"]
            return {"return": await self._run(self._call(item.value))} | identity
        except _RefusedMessage as refused:
            return identity | _failure(str(refused), refused.kind)
        except OSError as error:  # most of the package's errors about files are ones, too
            return identity | _failure(error.strerror or str(error), _GENERIC)
        except PyqmigrateError as error:
            return identity | _failure(str(error), _GENERIC)
        except Exception:
            _log.exception("a command failed in an unforeseen way")
            return identity | _failure("internal error; the log has the details", _GENERIC)

    def _call(self, message: Mapping[str, object]) -> _Call:
        """Check the members of a message, in the order in which they came."""
        command: str | None = None
        verb = ""
        arguments: dict[str, object] = {}
        for name, value in message.items():
            if name == "execute" or (name == "exec-oob" and "oob" in self._enabled):
                if not isinstance(value, str):
                    raise _RefusedMessage(f"QMP input member '{name}' must be a string")
                if command is not None:
                    raise _RefusedMessage("QMP input member 'execute' clashes with 'exec-oob'")
                command, verb = value, name
            elif name == "arguments":
                if not isinstance(value, dict):
                    raise _RefusedMessage("QMP input member 'arguments' must be an object")
                arguments = value
            elif name != "id":
                raise _RefusedMessage(f"QMP input member '{name}' is unexpected")
        if command is None:
            raise _RefusedMessage("QMP input lacks member 'execute'")
        return _Call(command, arguments, verb == "exec-oob")

    async def _run(self, call: _Call) -> object:
        if not self.negotiated:
            if call.command != _NEGOTIATION:
                raise _RefusedMessage(
                    f"Expecting capabilities negotiation with '{_NEGOTIATION}'", _NOT_FOUND
                )
            return self._negotiate(call.arguments)
        if call.command == _NEGOTIATION:
            return self._negotiate_again(call)
        command = self._context.commands.get(call.command)
        if command is None:
            raise _RefusedMessage(f"The command {call.command} has not been found", _NOT_FOUND)
        if call.out_of_band:
            raise _RefusedMessage(f"The command {call.command} does not support OOB")
        arguments = command.arguments.read(call.arguments)
        if command.blocks:
            with starting_threads():
                return await asyncio.to_thread(command.run, self._context, arguments)
        return command.run(self._context, arguments)

    def _negotiate(self, arguments: object) -> dict[str, object]:
        wanted = _negotiation(self._offered).read(arguments).get("enable", [])
        assert isinstance(wanted, list)
        self._enabled = {str(name) for name in wanted}
        self.negotiated = True
        return {}

    def _negotiate_again(self, call: _Call) -> object:
        if call.out_of_band:
            raise _RefusedMessage(f"The command {call.command} does not support OOB")
        _negotiation(self._offered).read(call.arguments)
        raise _RefusedMessage(
            "Capabilities negotiation is already complete, command ignored", _NOT_FOUND
        )


def _negotiation(offered: tuple[str, ...]) -> qapi.Struct:
    return qapi.Struct({"enable": qapi.optional(qapi.ListOf(qapi.Words(offered)))})


def _failure(text: str, kind: str) -> dict[str, object]:
    return {"error": {"class": kind, "desc": text}}


def event_message(event: Event) -> dict[str, object]:
    """Return an event as it is sent; without data it has no such member."""
    seconds, microseconds = divmod(round(event.time * 1_000_000), 1_000_000)
    message: dict[str, object] = {
        "timestamp": {"seconds": seconds, "microseconds": microseconds},
        "event": event.name,
    }
    if event.data is not None:
        message["data"] = dict(event.data)
    return message
