"""Checks that arguments have the documented types; a UsageError names the one that has not.

    check("machine", machine, str)
    check("offset", offset, int, type(None))

A wrong type would otherwise fail later, with the text of some inner function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pyqmigrate.errors import UsageError

__all__ = ["check", "check_callback", "check_mapping", "check_names"]

_CALLED = {
    type(None): "None",
    int: "a number",
    str: "text",
    bool: "True or False",
    float: "a number",
}


def check(name: str, value: object, *kinds: type) -> None:
    """Raise UsageError unless ``value`` is of one of ``kinds``; a bool is not an int here."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(_CALLED.get(kind, kind.__name__) for kind in kinds)
        raise UsageError(f"{name} must be {wanted}, not {value!r}")


def check_callback(name: str, value: object) -> None:
    """Raise UsageError unless ``value`` is None or callable."""
    if value is not None and not callable(value):
        raise UsageError(f"{name} must be a function or None, not {value!r}")


def check_names(name: str, value: object) -> None:
    """Raise UsageError unless ``value`` is None or an iterable of texts, not a single text."""
    if value is None:
        return
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise UsageError(f"{name} must be a list of names, not {value!r}")
    for member in value:
        check(f"a name in {name}", member, str)


def check_mapping(name: str, value: object, kind: type[Any] = object) -> None:
    """Raise UsageError unless ``value`` is a mapping from text to ``kind``."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} must be a mapping by name, not {value!r}")
    for key, member in value.items():
        check(f"a name in {name}", key, str)
        check(f"{name}[{key!r}]", member, kind, bool)
