"""Options that are taken as members or as their spelling."""

from __future__ import annotations

import enum
from typing import TypeVar

from pyqmigrate.errors import UsageError

__all__ = ["choice"]

E = TypeVar("E", bound=enum.StrEnum)


def choice(kind: type[E], value: E | str, name: str) -> E:
    """The member of ``kind`` that ``value`` is or spells; UsageError names the possible ones."""
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(repr(member.value) for member in kind)
        raise UsageError(f"{name} is {value!r}; it is one of {names}") from None
