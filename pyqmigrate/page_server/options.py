"""How pages are sent, and how that can end."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from pyqmigrate.enums import parse_enum
from pyqmigrate.format.working_set import TouchedRun

__all__ = ["Ending", "Push", "ServerOptions"]

_QUIET = 200_000  # nanoseconds without a request before anything is pushed
_HOLD = 1_000_000_000  # the same while a working set is recorded


class Push(enum.StrEnum):
    """When pages are sent that nobody has asked for: if no request came for 200 us, always, never."""

    IDLE = "idle"
    ALWAYS = "always"
    NEVER = "never"


class Ending(enum.Enum):
    """How a connection ended.

    ``DONE``: the destination has everything. ``BROKEN``: it can be replaced, if the package had been
    loaded. ``STOPPED``: on request.
    """

    DONE = "done"
    BROKEN = "broken"
    STOPPED = "stopped"


@dataclass(frozen=True)
class ServerOptions:
    """``working_set`` is pushed first, in its order. ``record``: while the guest asks for pages, nothing
    is pushed, so that the order of its requests is that of its touches."""

    push: Push = Push.IDLE
    working_set: Sequence[TouchedRun] = ()
    record: bool = False

    def __post_init__(self) -> None:
        parse_enum(Push, self.push, "push")

    @property
    def quiet(self) -> int:
        """Nanoseconds without a request before anything is pushed."""
        if self.push is Push.ALWAYS:
            return 0
        return _HOLD if self.record else _QUIET
