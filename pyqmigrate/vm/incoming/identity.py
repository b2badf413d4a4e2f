"""Identity that guests of one snapshot share, but should not.

A guest's memory contains a machine id, host keys and the state of its random number generator. A
device ``vmgenid`` informs the guest that it is a copy: the new QEMU writes the device's ``guid`` into
the loaded memory and raises an interrupt. A fixed ``guid`` on the command line would be the same for
all guests, so it is replaced by ``guid=auto``.
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
    """Return ``command`` with a new ``guid`` of ``vmgenid`` at each start, and notes.

    A ``guid`` that contains ``{n}`` stays: the caller replaces it.
    """
    changes: dict[Option, Option] = {}
    for option in command.all("device"):
        properties = option.properties("driver")
        number = properties.get("guid", _AUTOMATIC)
        is_fixed = number != _AUTOMATIC and _NUMBER not in number
        if properties.get("driver") == _GENERATION and is_fixed:
            changes[option] = option.with_property("guid", _AUTOMATIC)
    notes = [
        "vmgenid gets a new number (guid=auto), which informs the guest that it was restored"
    ] * bool(changes)
    return command.replaced(changes), notes


def shared_identity(command: CommandLine) -> str:
    """Return a sentence on the identity that guests of this command line share."""
    informed = any(
        option.properties("driver").get("driver") == _GENERATION for option in command.all("device")
    )
    return (
        "guests from one snapshot have the same UUID, MAC addresses, machine id, host keys and "
        "state of random numbers"
        + (
            ": vmgenid has them reseed the last; the others must be changed inside the guests"
            if informed
            else ": a device vmgenid would inform them (-device vmgenid, from the guest's first start on)"
        )
    )


def runs_already(fd: int) -> bool:
    """Return whether another QEMU locks the snapshot, since its memory is mapped from it."""
    info = os.fstat(fd)
    place = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    try:
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    fields = [line.split() for line in locks]
    holders = {
        line[4] for line in fields if len(line) > 5 and line[1] == "FLOCK" and line[5] == place
    }
    return bool(holders - {str(os.getpid())})
