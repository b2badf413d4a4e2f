"""The types of QMP's arguments, and QEMU's errors for values of other types.

A shape reads a JSON value (as Python's json module has it) and returns it checked, or raises
UsageError with QEMU's text. Members of an object are checked in the order of declaration, undeclared
ones last. As in QEMU, the text for a number out of range and for an unknown word names the innermost
member only (``null`` for an item of a list), and a negative number for an unsigned 64-bit type wraps
around.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pyqmigrate.errors import UsageError

__all__ = [
    "ANY",
    "BOOL",
    "INT",
    "NULL",
    "NUMBER",
    "STR",
    "STR_OR_NULL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "ListOf",
    "Shape",
    "Struct",
    "Words",
    "built_in",
    "optional",
    "required",
]


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a value: its whole path, and its own name (None in a list)."""

    path: str
    name: str | None

    def member(self, name: str) -> Place:
        return Place(f"{self.path}.{name}" if self.path else name, name)

    def item(self, index: int) -> Place:
        return Place(f"{self.path}[{index}]", None)

    @property
    def innermost(self) -> str:
        return "null" if self.name is None else self.name


_TOP = Place("", None)


class Shape(Protocol):
    """A type of JSON values."""

    def read(self, value: object, place: Place = _TOP) -> object:
        """Return ``value`` checked and converted. Raises UsageError."""


def _wrong_type(place: Place, expected: str) -> UsageError:
    return UsageError(f"Invalid parameter type for '{place.path}', expected: {expected}")


@dataclass(frozen=True, slots=True)
class _Plain:
    """A Python type that needs no conversion: bool, str."""

    type: type
    word: str

    def read(self, value: object, place: Place = _TOP) -> object:
        if type(value) is not self.type:
            raise _wrong_type(place, self.word)
        return value


@dataclass(frozen=True, slots=True)
class _Int:
    """A signed 64-bit integer."""

    def read(self, value: object, place: Place = _TOP) -> int:
        if type(value) is not int or not -(2**63) <= value < 2**63:
            raise _wrong_type(place, "integer")
        return value


@dataclass(frozen=True, slots=True)
class _Unsigned:
    """An unsigned integer of ``bits`` bits."""

    bits: int

    def read(self, value: object, place: Place = _TOP) -> int:
        if type(value) is not int or not -(2**63) <= value < 2**64:
            raise UsageError(f"Parameter '{place.path}' expects uint64")
        value %= 2**64
        if value >> self.bits:
            raise UsageError(f"Parameter '{place.innermost}' expects uint{self.bits}_t")
        return value


@dataclass(frozen=True, slots=True)
class _StrOrNull:
    """A text; null is the empty one."""

    def read(self, value: object, place: Place = _TOP) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise _wrong_type(place, "StrOrNull")
        return value


@dataclass(frozen=True, slots=True)
class _Any:
    """Any JSON value."""

    def read(self, value: object, place: Place = _TOP) -> object:
        return value


ANY: Shape = _Any()
BOOL: Shape = _Plain(bool, "boolean")
NULL: Shape = _Plain(type(None), "null")
NUMBER: Shape = _Plain(float, "number")
STR: Shape = _Plain(str, "string")
INT: Shape = _Int()
UINT8: Shape = _Unsigned(8)
UINT16: Shape = _Unsigned(16)
UINT32: Shape = _Unsigned(32)
UINT64: Shape = _Unsigned(64)
STR_OR_NULL: Shape = _StrOrNull()


_BUILT_IN = {
    ANY: ("any", "value"),
    BOOL: ("bool", "boolean"),
    NULL: ("null", "null"),
    NUMBER: ("number", "number"),
    STR: ("str", "string"),
    **dict.fromkeys((INT, UINT8, UINT16, UINT32, UINT64), ("int", "int")),
}


def built_in(shape: Shape) -> tuple[str, str] | None:
    """Return the name and the JSON type of a built-in type; None for a shape that is not one."""
    plain = isinstance(shape, _Any | _Plain | _Int | _Unsigned)
    return _BUILT_IN[shape] if plain else None


@dataclass(frozen=True, slots=True)
class Words:
    """One of some words."""

    words: tuple[str, ...]

    def read(self, value: object, place: Place = _TOP) -> str:
        if not isinstance(value, str):
            raise _wrong_type(place, "string")
        if value not in self.words:
            raise UsageError(f"Parameter '{place.innermost}' does not accept value '{value}'")
        return value


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list, every item of one shape."""

    shape: Shape

    def read(self, value: object, place: Place = _TOP) -> list[object]:
        if not isinstance(value, list):
            raise _wrong_type(place, "array")
        return [self.shape.read(item, place.item(index)) for index, item in enumerate(value)]


@dataclass(frozen=True, slots=True)
class _Optional:
    shape: Shape

    def read(self, value: object, place: Place = _TOP) -> object:
        return self.shape.read(value, place)


def optional(shape: Shape) -> Shape:
    """Mark a member of a Struct that may be absent."""
    return _Optional(shape)


def required(shape: Shape) -> Shape:
    """Return the shape of an optional member; any other shape unchanged."""
    return shape.shape if isinstance(shape, _Optional) else shape


@dataclass(frozen=True, slots=True)
class Struct:
    """An object with known members; ``tag`` names the one that chooses among ``branches``."""

    members: Mapping[str, Shape]
    tag: str = ""
    branches: Mapping[str, Struct] = field(default_factory=dict)

    def read(self, value: object, place: Place = _TOP) -> dict[str, object]:
        """Return the members of ``value``, in the order of declaration."""
        if not isinstance(value, dict):
            raise _wrong_type(place, "object")
        known = self._read_members(value, place)
        for name in value:
            if name not in known:
                raise UsageError(f"Parameter '{place.member(name).path}' is unexpected")
        return known

    def _read_members(self, value: dict[str, object], place: Place) -> dict[str, object]:
        known: dict[str, object] = {}
        for name, shape in self.members.items():
            if name in value:
                known[name] = shape.read(value[name], place.member(name))
            elif not isinstance(shape, _Optional):
                raise UsageError(f"Parameter '{place.member(name).path}' is missing")
        branch = self.branches.get(str(known.get(self.tag)))
        if branch is not None:
            known.update(branch._read_members(value, place))
        return known
