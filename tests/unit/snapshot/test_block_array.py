"""A block as an array: what numpy reads is the memory, and only what is indexed is read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyqmigrate
from pyqmigrate import NotSupported, UsageError, open_snapshot
from tests.harness.snapshots import Bytes, save_known


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bytes]:
    path = tmp_path_factory.mktemp("array") / "a"
    return path, save_known(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(part=st.slices(512 * 4096), index=st.integers(-512 * 4096, 512 * 4096 - 1))
def test_indexing_is_that_of_the_memory(saved: tuple[Path, Bytes], part: slice, index: int) -> None:
    path, memory = saved
    with open_snapshot(path) as snapshot:
        array = snapshot.blocks["ram"].as_array()
        assert array.shape == memory.shape
        assert np.array_equal(array[part], memory[part])
        assert array[index] == memory[index]
        assert not array[part].flags.writeable


def test_numpy_reads_all_of_it(saved: tuple[Path, Bytes], tmp_path: Path) -> None:
    path, memory = saved
    pyqmigrate.convert(path, tmp_path / "stream", to="stream")
    for each in (path, tmp_path / "stream"):
        with open_snapshot(each) as snapshot:
            array = snapshot.blocks["ram"].as_array()
            assert np.array_equal(np.asarray(array), memory)
            assert np.asarray(array, dtype="u2").dtype == "u2"
            assert np.count_nonzero(array) == np.count_nonzero(memory)  # type: ignore[call-overload]


def test_only_what_is_indexed_is_read(saved: tuple[Path, Bytes], tmp_path: Path) -> None:
    path, memory = saved
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    with open_snapshot(copy) as snapshot:
        array = snapshot.blocks["ram"].as_array()
        _ = snapshot.blocks["ram"].bitmap
        with copy.open("r+b") as file:
            file.truncate(snapshot.blocks["ram"].layout.pages_offset + (1 << 20))  # type: ignore[union-attr]
        assert np.array_equal(array[:4096], memory[:4096])
        with pytest.raises(pyqmigrate.SnapshotError, match="truncated"):
            np.asarray(array)


@pytest.mark.parametrize("index", [1 << 40, -(1 << 40), "a", np.array([True])])
def test_other_indexes_are_refused(saved: tuple[Path, Bytes], index: object) -> None:
    with open_snapshot(saved[0]) as snapshot, pytest.raises(IndexError):
        snapshot.blocks["ram"].as_array()[index]


def test_block_without_content_is_refused(
    saved: tuple[Path, Bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_snapshot(saved[0]) as snapshot:
        block = snapshot.blocks["ram"]
        monkeypatch.setattr(type(block), "external", True)
        with pytest.raises(UsageError, match="not in this file"):
            block.as_array()


def test_without_numpy_it_is_not_supported(
    saved: tuple[Path, Bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with open_snapshot(saved[0]) as snapshot, pytest.raises(NotSupported, match="numpy"):
        snapshot.blocks["ram"].as_array()
