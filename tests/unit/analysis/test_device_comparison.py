"""The paths of device fields, and which of them differ."""

from __future__ import annotations

from dataclasses import replace

from pyqmigrate.analysis.device_comparison import _fields, leaves
from pyqmigrate.analysis.report import FieldDiff
from pyqmigrate.format.device.values import Device, Field, State, Value


def field(name: str, value: Value, index: int | None = None) -> Field:
    return Field(name, "uint32", 0, 4, value, index)


def state(*fields: Field, name: str = "", subsections: tuple[State, ...] = ()) -> State:
    return State(name, 1, 0, 0, fields, subsections)


def device(*fields: Field, version: int = 1, subsections: tuple[State, ...] = ()) -> Device:
    tree = state(*fields, subsections=subsections)
    return Device("cpu", 0, version, 3, 0, 9, 0, 9, tree, True, True)


def test_paths_have_structs_arrays_and_subsections() -> None:
    segments = tuple(state(field("base", n)) for n in (7, 8))
    tree = state(
        field("env", state(field("eip", 1), field("segs", segments))),
        field("regs", (4, 5)),
        field("irq", 2, index=3),
        subsections=(state(field("x", 9), name="cpu/vfp"),),
    )
    assert leaves(tree) == {
        "env.eip": 1,
        "env.segs[0].base": 7,
        "env.segs[1].base": 8,
        "regs": (4, 5),
        "irq[3]": 2,
        "cpu/vfp.x": 9,
    }


def test_fields_of_one_name_are_told_apart() -> None:
    assert leaves(state(field("a", 1), field("a", 2), field("", b"?"))) == {
        "a": 1,
        "a#2": 2,
        "?": b"?",
    }


def test_equal_devices_have_no_differences() -> None:
    assert list(_fields(device(field("a", 1)), device(field("a", 1)))) == []


def test_another_value_or_kind_of_value_is_a_difference() -> None:
    a, b = device(field("a", 1), field("b", True)), device(field("a", 2), field("b", 1))
    assert list(_fields(a, b)) == [FieldDiff("a", 1, 2), FieldDiff("b", True, 1)]


def test_fields_of_one_only_are_named_with_its_letter() -> None:
    vfp = state(field("x", 9), name="cpu/vfp")
    a, b = device(field("a", 1), field("old", None)), device(field("a", 1), subsections=(vfp,))
    assert list(_fields(a, b)) == [
        FieldDiff("old", None, None, "a"),
        FieldDiff("cpu/vfp.x", None, 9, "b"),
    ]


def test_another_version_is_a_difference() -> None:
    a = device(field("a", 1))
    assert list(_fields(a, replace(a, version_id=2))) == [FieldDiff("version_id", 1, 2)]
