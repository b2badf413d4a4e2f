"""Strings in a snapshot's memory are those that binutils' strings finds in the memory itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyqmigrate import UsageError, open_snapshot
from pyqmigrate.analysis import memory_scan
from pyqmigrate.analysis.text_search import LONGEST_TEXT, strings
from tests.harness.searching import PAGE, SMALL_WINDOW, memories, save, strings_of
from tests.harness.snapshots import Bytes


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_scan, "_WINDOW", SMALL_WINDOW)


def found(path: Path, least: int, **options: bool) -> list[tuple[int, bytes]]:
    encoding = "utf-16-le" if options.get("utf_16") else "ascii"
    with open_snapshot(path) as snapshot:
        return [(t.offset, t.text.encode(encoding)) for t in strings(snapshot, least, **options)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(memory=memories(), least=st.integers(1, 9), wide=st.booleans(), shift=st.integers(0, 1))
def test_strings_are_those_of_the_memory(
    tmp_path: Path, memory: Bytes, least: int, wide: bool, shift: int
) -> None:
    if wide:
        memory[shift ^ 1 :: 2] = 0
    save(tmp_path / "a", ("ram", memory))
    assert found(tmp_path / "a", least, utf_16=wide) == strings_of(
        memory.tobytes(), least, utf_16=wide
    )


@pytest.mark.skipif(shutil.which("strings") is None, reason="binutils is not installed")
@pytest.mark.parametrize("wide", [False, True])
def test_binutils_finds_the_same(tmp_path: Path, wide: bool) -> None:
    rng = np.random.default_rng(3)
    memory = rng.choice(np.frombuffer(b"ab \t~\0\0\n\x7f\x80", np.uint8), 300 * PAGE)
    if wide:
        memory[1::2] = 0
    (tmp_path / "raw").write_bytes(memory.tobytes())
    save(tmp_path / "a", ("ram", memory))
    text = subprocess.check_output(
        ["strings", "-a", "-t", "d", "-n", "5", "-e", "l" if wide else "s", tmp_path / "raw"]
    ).decode()
    expected = [(int(m[1]), m[2]) for m in re.finditer(r"^ *(\d+) (.*)$", text, re.MULTILINE)]
    with open_snapshot(tmp_path / "a") as snapshot:
        assert [(t.offset, t.text) for t in strings(snapshot, 5, utf_16=wide)] == expected
    assert len(expected) > 100


def test_long_string_comes_in_parts(tmp_path: Path) -> None:
    memory = np.full(LONGEST_TEXT + 3 * PAGE, ord("x"), np.uint8)
    save(tmp_path / "a", ("ram", memory))
    with open_snapshot(tmp_path / "a") as snapshot:
        lengths = [text.length for text in strings(snapshot)]
    assert sum(lengths) == len(memory)
    assert max(lengths) <= LONGEST_TEXT


def test_least_length_is_checked(tmp_path: Path) -> None:
    save(tmp_path / "a", ("ram", np.ones(PAGE, np.uint8)))
    with open_snapshot(tmp_path / "a") as snapshot, pytest.raises(UsageError, match="not 0"):
        strings(snapshot, 0)
