"""Correct the guest's wall clock after a save or a restore.

While a guest is stopped, so are its clocks. Linux and others derive their wall clock from them, so
it falls behind with every pause, and after a restore by the time since the save.
"""

from __future__ import annotations

import os
from pathlib import Path

from pyqmigrate.errors import QemuError

__all__ = ["correct_clock", "note_on_clock"]

_WORTH_A_NOTE = 1.0  # seconds
_AGENT_TIMEOUT = 5.0  # seconds
_CURES = (
    "set it with the guest agent's guest-set-time (--set-time), or with a time service in the guest "
    "that may step (chrony's makestep)"
)


def note_on_clock(behind: float) -> list[str]:
    """Return a note that the wall clock is ``behind`` by so many seconds; none below a second."""
    if behind < _WORTH_A_NOTE:
        return []
    return [f"the guest's wall clock is about {_spelled(behind)} behind: {_CURES}"]


async def correct_clock(pid: int | None, agent: str | os.PathLike[str] | None) -> list[str]:
    """Set the clock of the guest of QEMU ``pid`` through its agent; return notes on the result.

    ``agent`` is the agent's socket; None finds it in QEMU's command line. Takes at most a few
    seconds; an agent that does not answer is not an error.
    """
    from pyqmigrate.vm.guest.agent import find_agent, set_time  # imported only when used

    path = Path(agent) if agent is not None else find_agent(pid)
    if path is None:
        return [
            "the guest's clock was not set: QEMU's command line has no guest agent socket "
            "(-device virtserialport,name=org.qemu.guest_agent.0): give it (--guest-agent PATH)"
        ]
    try:
        await set_time(path, timeout=_AGENT_TIMEOUT)
    except QemuError as error:
        return [f"the guest's clock was not set: {error}"]
    return ["the guest's clock was set to the host's through its agent"]


def _spelled(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
