"""Adapt the command line of a VM to a restore."""

from __future__ import annotations

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.qemu.command_line import CommandLine, Option

__all__ = ["make_incoming"]

_REFUSED = {
    "loadvm": "the guest's state comes from the snapshot",
    "preconfig": "the machine must be complete when the snapshot is loaded",
}
_PAUSED = Option("S")


def make_incoming(command: CommandLine, *, paused: bool | None) -> tuple[CommandLine, list[str]]:
    """Return ``command`` for a QEMU that waits for a snapshot, and notes on what else changed.

    ``paused``: whether the guest stays paused; None keeps ``-S`` as it is. Raises UsageError for
    options that contradict a restore.
    """
    notes = []
    for option in command.options:
        if option.name in _REFUSED:
            raise UsageError(f"{option} conflicts with a restore: {_REFUSED[option.name]}")
        if option.name == "incoming" and option.value != "defer":
            raise UsageError(f"{option} conflicts with a restore, which adds its own -incoming")
    if command.has("daemonize"):
        notes.append("-daemonize is left out: QEMU must stay the process that the restore starts")
    if paused is False and command.has("S"):
        notes.append("-S is left out: the guest shall run")
    stays = command.has("S") if paused is None else paused
    command = command.without("incoming", "daemonize", "S")
    added = [Option("incoming", "defer")] + [_PAUSED] * stays
    return command.with_options(*added), notes
