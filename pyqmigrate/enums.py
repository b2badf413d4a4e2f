"""Options that are taken as members or as their spelling."""

from __future__ import annotations

import enum
from typing import TypeVar

from pyqmigrate.errors import UsageError

__all__ = ["Format", "parse_enum"]

E = TypeVar("E", bound=enum.StrEnum)


class Format(enum.StrEnum):
    """What a file of a guest's memory is, and what one can be converted to.

    ``mapped-ram`` and ``stream`` (a sequential stream: page records one after another) are QEMU's
    own. A ``libvirt`` save image is one of the two behind a header; ``raw`` is a directory with a
    file for each RAM block; ``elf`` and ``lime`` hold the guest's physical memory.
    """

    MAPPED_RAM = "mapped-ram"
    SEQUENTIAL = "stream"
    RAW = "raw"
    ELF = "elf"
    LIME = "lime"
    LIBVIRT = "libvirt"


def parse_enum(kind: type[E], value: E | str, name: str) -> E:
    """The member of ``kind`` that ``value`` is or spells; UsageError names the possible ones."""
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(repr(member.value) for member in kind)
        raise UsageError(f"{name} is {value!r}; it is one of {names}") from None
