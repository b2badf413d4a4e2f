"""The protocol of a pool's socket: one JSON object a line (docs/pool.md).

A request names a ``command``; the reply has ``error``, or what that command returns. Both end with a
newline. ``id`` of a request is returned with its reply.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from pyqmigrate.errors import UsageError

__all__ = ["LINE_MAX", "Command", "Request", "decode_line", "encode_error", "encode_reply"]

LINE_MAX = 4096  # bytes of a request, with its newline
_NUMBER_MAX = 1 << 53  # what every JSON library reads exactly
_ID_MAX = 256  # characters
_SHOWN_MAX = 40  # characters of a value in an error


class Command(enum.StrEnum):
    """What a client can ask for."""

    TAKE = "take"
    RESET = "reset"
    END = "end"
    STATUS = "status"


_KEYS = {
    Command.TAKE: {"paused"},
    Command.RESET: {"number", "paused"},
    Command.END: {"number"},
    Command.STATUS: set[str](),
}


class Request(NamedTuple):
    """A checked request. ``number`` is a guest's, None for the only one of the client; ``paused``
    None does as the pool."""

    command: Command
    number: int | None = None
    paused: bool | None = None

    @classmethod
    def decode(cls, data: Mapping[str, Any]) -> Self:
        """Check a request. Raises UsageError that names what is wrong."""
        name = data.get("command")
        if name not in list(Command):
            raise UsageError(f"command must be {', '.join(Command)}, not {_shown(name)}")
        command = Command(name)
        if unknown := data.keys() - _KEYS[command] - {"command", "id"}:
            raise UsageError(f"{command} has no key {_shown(min(unknown))}")
        number, paused = data.get("number"), data.get("paused")
        if number is not None and not (type(number) is int and 0 < number < _NUMBER_MAX):
            raise UsageError(f"number must be that of a guest, not {_shown(number)}")
        if paused is not None and not isinstance(paused, bool):
            raise UsageError(f"paused must be true or false, not {_shown(paused)}")
        return cls(command, number, paused)


def decode_line(line: bytes) -> tuple[dict[str, Any], str | int | None]:
    """Return the object on a line, and its ``id``. Raises UsageError for anything else."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"a request must be a JSON object on one line: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"a request must be a JSON object, not {_shown(data)}")
    identity = data.get("id")
    if identity is not None and not (
        (isinstance(identity, str) and len(identity) <= _ID_MAX)
        or (type(identity) is int and abs(identity) < _NUMBER_MAX)
    ):
        raise UsageError(f"id must be a number or a text of at most {_ID_MAX} characters")
    return data, identity


def encode_reply(data: Mapping[str, Any], identity: str | int | None = None) -> bytes:
    """Return the line of a reply."""
    if identity is not None:
        data = {"id": identity, **data}
    return json.dumps(data).encode() + b"\n"


def encode_error(error: Exception, identity: str | int | None = None) -> bytes:
    """Return the line of a reply to a request that failed."""
    return encode_reply({"error": {"type": type(error).__name__, "message": str(error)}}, identity)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "..."
