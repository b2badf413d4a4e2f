"""Descriptors that QEMU inherits from its caller: ``-add-fd fd=5``, ``-netdev tap,fd=5``."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.qemu.command_line import CommandLine, Option

__all__ = ["check_descriptors", "descriptors_in_use", "inherited_descriptors"]

_NAMING = ("add-fd", "chardev", "device", "net", "netdev", "nic", "object")
_KEYS = ("fd", "fds", "vhostfd", "vhostfds")


def inherited_descriptors() -> tuple[int, ...]:
    """Return the inheritable descriptors from 3 on: this process inherited them itself.

    Descriptors that Python opens are closed on exec.
    """
    found = []
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        try:
            if fd > 2 and os.get_inheritable(fd):
                found.append(fd)
        except OSError:  # that of the listing itself
            continue
    return tuple(sorted(found))


def check_descriptors(fds: Collection[int]) -> tuple[int, ...]:
    """Return them as a tuple; raise UsageError if one is not open."""
    for fd in fds:
        try:
            os.fstat(fd)
        except (OSError, OverflowError) as error:
            raise UsageError(f"descriptor {fd} is not open and cannot be passed on") from error
    return tuple(fds)


def descriptors_in_use(command: CommandLine) -> dict[str, Option]:
    """Return the descriptors that two guests cannot share, with the option that names each.

    A regular file that is open for reading only can be shared.
    """
    found: dict[str, Option] = {}
    for option in command.options:
        if option.name in _NAMING:
            for text in _named(option):
                if text.isdecimal() and not _is_read_only(int(text)):
                    found[f"descriptor {text}"] = option
        if option.name == "readconfig" and not Path(option.value or "").is_file():
            found[f"the input of {option.value}"] = option
    return found


def _named(option: Option) -> Iterator[str]:
    properties = option.properties()
    for key, value in properties.items():
        front, _, last = key.rpartition(".")
        if last in _KEYS:
            yield from value.split(":")
        if last == "str" and properties.get(f"{front}.type") == "fd":
            yield value


def _is_read_only(fd: int) -> bool:
    try:
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        return access == os.O_RDONLY and stat.S_ISREG(os.fstat(fd).st_mode)
    except (OSError, OverflowError):
        return False
