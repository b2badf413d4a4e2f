"""Options that are given as enum members or as their values."""

from __future__ import annotations

import enum
from typing import TypeVar

from pyqmigrate.errors import UsageError

__all__ = ["Clear", "Format", "parse_enum"]

E = TypeVar("E", bound=enum.StrEnum)


class Format(enum.StrEnum):
    """The format of a file with a guest's memory.

    ``mapped-ram`` and ``stream`` (a sequential stream: page records one after another) are QEMU's
    own. A ``libvirt`` save image is one of the two after a header; ``raw`` is a directory with a
    file for each RAM block; ``elf`` and ``lime`` contain the guest's physical memory. An
    ``increment`` has what changed since a base snapshot; nothing is converted to it.
    """

    MAPPED_RAM = "mapped-ram"
    SEQUENTIAL = "stream"
    RAW = "raw"
    ELF = "elf"
    LIME = "lime"
    LIBVIRT = "libvirt"
    INCREMENT = "increment"


class Clear(enum.StrEnum):
    """What to do with pages without data: ``zero`` makes them zero (holes, if the memory is a
    file), ``leave`` does not touch them, for memory that is known to be fresh."""

    ZERO = "zero"
    LEAVE = "leave"


def parse_enum(kind: type[E], value: E | str, name: str) -> E:
    """Return the member of ``kind`` for ``value``; UsageError lists the possible ones."""
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(repr(member.value) for member in kind)
        raise UsageError(f"{name} must be one of {names}, not {value!r}") from None
