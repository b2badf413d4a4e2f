"""Options are taken as members or as their spelling."""

from __future__ import annotations

import enum

import pytest

import pyqmigrate
from pyqmigrate import Clear, DirectIO, Sparse, UsageError
from pyqmigrate.enums import parse_enum


@pytest.mark.parametrize("kind", [DirectIO, Sparse, Clear])
def test_a_member_and_its_spelling_are_the_same_choice(kind: type[enum.StrEnum]) -> None:
    for member in kind:
        assert parse_enum(kind, member, "option") is member
        assert parse_enum(kind, member.value, "option") is member


@pytest.mark.parametrize("value", ["", "ON", "yes", None, 1, True, b"on", ["on"]])
def test_anything_else_names_the_option_and_what_is_possible(value: object) -> None:
    with pytest.raises(UsageError) as caught:
        parse_enum(DirectIO, value, "direct_io")  # type: ignore[arg-type]
    for word in ["direct_io", repr(value), "'on'", "'off'", "'auto'"]:
        assert word in str(caught.value)


def test_the_spellings_are_those_of_the_contract() -> None:
    assert [*DirectIO] == ["on", "off", "auto"]
    assert [*Sparse] == ["auto", "exact", "dense"]
    assert [*Clear] == ["zero", "leave"]


def test_every_public_name_is_there() -> None:
    for name in pyqmigrate.__all__:
        assert hasattr(pyqmigrate, name)
