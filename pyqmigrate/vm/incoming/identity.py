"""What guests that go on from one snapshot have in common, and should not.

A guest calls many things its own that are in its memory: a machine id, host keys, the state of its
random numbers. A device ``vmgenid`` tells it that it is a copy: it has a number that the new QEMU
puts into the loaded memory, with an interrupt. A number that is fixed on the command line would be
the same for all, so QEMU makes a new one (``guid=auto``).
"""

from __future__ import annotations

import os
from pathlib import Path

from pyqmigrate.vm.qemu.command_line import CommandLine, Option

__all__ = ["runs_already", "shared_identity", "with_new_generation"]

_GENERATION = "vmgenid"
_AUTOMATIC = "auto"
_NUMBER = "{n}"


def with_new_generation(command: CommandLine) -> tuple[CommandLine, list[str]]:
    """``command`` whose ``vmgenid`` has a number of its own at each start, and what was changed.

    A number with ``{n}`` in it stays: the caller sees to it.
    """
    changes: dict[Option, Option] = {}
    for option in command.all("device"):
        properties = option.properties("driver")
        number = properties.get("guid", _AUTOMATIC)
        is_fixed = number != _AUTOMATIC and _NUMBER not in number
        if properties.get("driver") == _GENERATION and is_fixed:
            changes[option] = option.with_property("guid", _AUTOMATIC)
    notes = [
        "vmgenid gets a new number (guid=auto): the guest learns that it goes on from a snapshot"
    ] * bool(changes)
    return command.replaced(changes), notes


def shared_identity(command: CommandLine) -> str:
    """A sentence on what the guests that this command line makes have in common."""
    told = any(
        option.properties("driver").get("driver") == _GENERATION for option in command.all("device")
    )
    return (
        "guests from one snapshot have the same UUID, MAC addresses, machine id, host keys and "
        "state of random numbers"
        + (
            ": vmgenid tells them to renew the last; the others are theirs to change"
            if told
            else ": a device vmgenid would tell them (-device vmgenid, when the guest is first started)"
        )
    )


def runs_already(fd: int) -> bool:
    """Whether another guest's memory is mapped from the snapshot: its QEMU has a lock on it."""
    info = os.fstat(fd)
    place = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    try:
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    words = [line.split() for line in locks]
    holders = {
        each[4] for each in words if len(each) > 5 and each[1] == "FLOCK" and each[5] == place
    }
    return bool(holders - {str(os.getpid())})
