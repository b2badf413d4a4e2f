"""How far a lazy restore is, as its keeper reports it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["DAMAGES_MAX", "ENDED", "Progress", "State", "status_name"]

ENDED = ("completed", "failed", "gone")
DAMAGES_MAX = 100
_WARNINGS_MAX = 20

# Keys of the state, and the server's names for them.
_COUNTS = {"pages_left": "pages_left", "faults": "requests", "fault_seconds": "mean_latency"}
_DAMAGE = {"block": "block", "page": "page", "why": "error"}

State = dict[str, Any]
"""What is reported of a restore:

==============  ===================================================================
state           ``starting``; ``running`` (pages are missing), ``recovering`` (the
                server is being replaced), then one of ``completed``, ``failed`` and
                ``gone`` (QEMU ended)
loaded          whether QEMU has loaded the device state: from then on a restore is
                not lost if the server dies
pages_left      data pages that were not sent yet, or null
faults          requests for pages by QEMU so far, and
fault_seconds   their mean latency in the server, or null
restarts        how often the server was replaced
damages         a list of ``block``, ``page`` and ``why``: pages that cannot be had
warnings        sentences on what went wrong
huge            bytes of memory that were made huge pages at the end
failure         why it ``failed``, or null
==============  ===================================================================
"""


def status_name(pid: int) -> str:
    """Return the abstract name of the status socket for the QEMU with this process id."""
    return f"\0pyqmigrate-lazy/{pid}"


class Progress:
    """The state of one restore; ``publish`` is called with it after a change that others should see."""

    def __init__(self, publish: Callable[[State], None]) -> None:
        self._publish = publish
        self.values: State = {
            "state": "starting",
            "loaded": False,
            "pages_left": None,
            "faults": 0,
            "fault_seconds": None,
            "restarts": 0,
            "damages": [],
            "warnings": [],
            "huge": 0,
            "failure": None,
        }

    @property
    def ended(self) -> bool:
        return self.values["state"] in ENDED

    @property
    def loaded(self) -> bool:
        return bool(self.values["loaded"])

    def publish(self) -> None:
        self._publish(self.values)

    def note(self, message: str) -> None:
        """Add a warning, unless it is there."""
        warnings = self.values["warnings"]
        if message not in warnings:
            warnings.append(message)
            del warnings[:-_WARNINGS_MAX]
            self.publish()

    def count(self, line: dict[str, Any]) -> None:
        """Take the counts in a line of the server."""
        for key, name in _COUNTS.items():
            if name in line:
                self.values[key] = line[name]

    def add_damage(self, line: dict[str, Any]) -> bool:
        """List a page, unless that was done or there are too many; return whether it was listed."""
        damage = {name: line.get(key) for name, key in _DAMAGE.items()}
        damages = self.values["damages"]
        if damage in damages or len(damages) >= DAMAGES_MAX:
            return False
        damages.append(damage)
        return True

    def end(self, state: str, failure: str | None) -> None:
        """End in one of the states ENDED, unless it has ended."""
        if not self.ended:
            self.values |= {"state": state, "failure": failure}
            self.publish()
