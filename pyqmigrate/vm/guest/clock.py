"""What a save or a restore does to the guest's wall clock, and how to put it right.

While a guest does not run its clocks stand still, too. Linux and others count their wall clock from
those, so it falls behind by every pause, and after a restore by all the time since the save.
"""

from __future__ import annotations

import os
from pathlib import Path

from pyqmigrate.errors import QemuError

__all__ = ["correct_clock", "note_on_clock"]

_WORTH_A_NOTE = 1.0  # seconds
_AGENT_TIMEOUT = 5.0  # seconds
_CURES = (
    "the guest agent's guest-set-time sets it (--set-time), and so does a time service in the "
    "guest that may step (chrony's makestep)"
)


def note_on_clock(behind: float) -> list[str]:
    """A sentence for a guest that runs again, its wall clock ``behind`` by so many seconds; none
    where that is less than a second."""
    if behind < _WORTH_A_NOTE:
        return []
    return [f"the guest's wall clock is about {_spelled(behind)} behind: {_CURES}"]


async def correct_clock(pid: int | None, agent: str | os.PathLike[str] | None) -> list[str]:
    """Set the clock of the guest of QEMU ``pid`` by its agent, and return what came of it.

    ``agent`` is the agent's socket; None finds it in QEMU's command line. Takes a few seconds at
    most; an agent that does not answer is not an error.
    """
    from pyqmigrate.vm.guest.agent import find_agent, set_time  # no restore without it waits for it

    path = Path(agent) if agent is not None else find_agent(pid)
    if path is None:
        return [
            "the guest's clock was not set: QEMU's command line has no socket of a guest agent "
            "(-device virtserialport,name=org.qemu.guest_agent.0); name it (--guest-agent PATH)"
        ]
    try:
        await set_time(path, timeout=_AGENT_TIMEOUT)
    except QemuError as error:
        return [f"the guest's clock was not set: {error}"]
    return ["the guest's clock was set to this host's, by its agent"]


def _spelled(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
