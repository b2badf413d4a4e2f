"""Who may import whom between tests/, tests/harness/ and bench/."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[3]
_HARNESS = _ROOT / "tests" / "harness"


def files(*rooms: str) -> list[Path]:
    return sorted(file for room in rooms for file in (_ROOT / room).rglob("*.py"))


@functools.cache
def imported(file: Path) -> list[str]:
    """The modules that a file imports."""
    return [
        module
        for node in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for module in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [name.name for name in node.names]
        )
    ]


def test_tests_import_nothing_of_bench() -> None:
    bad = {file.name: m for file in files("tests") for m in imported(file) if m.startswith("bench")}
    assert bad == {}


@pytest.mark.parametrize("room", ["tests", "bench"])
def test_of_tests_only_the_harness_is_imported(room: str) -> None:
    bad = {
        str(file): module
        for file in files(room)
        for module in imported(file)
        if module.startswith("tests") and module.split(".")[:2] != ["tests", "harness"]
    }
    assert bad == {}


def test_measurements_of_parts_do_not_import_the_comparison() -> None:
    bad = {f.name: m for f in files("bench/micro") for m in imported(f) if "bench.compare" in m}
    assert bad == {}


def test_rooms_of_tests_hold_tests_only() -> None:
    others = {
        file.relative_to(_ROOT / "tests").as_posix()
        for file in files("tests/unit", "tests/qemu")
        if not file.name.startswith("test_") and file.name not in ("conftest.py", "__init__.py")
    }
    assert others == set()


def test_harness_holds_no_test() -> None:
    assert list(_HARNESS.rglob("test_*.py")) == []
