"""A plain file is made of a stored snapshot."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import NoSpace, TargetError, UsageError
from pyqmigrate.format.store.config import PAGE
from pyqmigrate.store import getting
from pyqmigrate.store.damage import DamagedPack
from pyqmigrate.store.getting import get
from pyqmigrate.store.store import NoSnapshot, Store
from tests.harness.stores import image, put_snapshot

CONTENT = bytes(100 * PAGE) + image(3000, seed=1) + bytes(500 * PAGE) + b"device state"
SEAL = b'{"format": "pyqmigrate-seal", ...'
RECORD = b'{\n  "format": "pyqmigrate vm record",\n}'


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "store") as found:
        put_snapshot(
            found, "a", CONTENT, extents=[(3600 * PAGE, 12)], seal=SEAL,
            companions={".vm.json": RECORD},
        )  # fmt: skip
        yield found


def listed(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name != "store")


def test_the_file_is_the_same_in_every_byte_with_time_seal_and_record(
    store: Store, tmp_path: Path
) -> None:
    report = get(store, "a", tmp_path / "a.mapped")
    path = tmp_path / "a.mapped"
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mtime_ns == 1_700_000_000_123_456_789
    assert (tmp_path / "a.mapped.seal").read_bytes() == SEAL
    assert (tmp_path / "a.mapped.vm.json").read_bytes() == RECORD
    assert listed(tmp_path) == ["a.mapped", "a.mapped.seal", "a.mapped.vm.json"]
    assert report.path == str(path)
    assert report.size == len(CONTENT)


def test_pages_without_data_are_holes(store: Store, tmp_path: Path) -> None:
    report = get(store, "a", tmp_path / "a.mapped")
    zero = sum(not any(CONTENT[k : k + PAGE]) for k in range(0, len(CONTENT), PAGE))
    assert zero > 600
    assert report.bytes_written == len(CONTENT) - zero * PAGE
    allocated = (tmp_path / "a.mapped").stat().st_blocks * 512
    assert allocated <= report.bytes_written + 200 * PAGE  # of a file system with larger blocks


def test_a_file_of_the_name_is_replaced_with_what_was_beside_it(
    store: Store, tmp_path: Path
) -> None:
    put_snapshot(store, "b", b"new", extents=[(0, 3)], seal=SEAL)
    get(store, "a", tmp_path / "x")
    get(store, "b", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert listed(tmp_path) == ["x", "x.seal"]  # the record was that of the old file


def test_a_file_beside_it_that_is_not_ours_is_not_replaced(store: Store, tmp_path: Path) -> None:
    (tmp_path / "x.seal").write_bytes(b"mine")
    with pytest.raises(UsageError, match="which has other content"):
        get(store, "a", tmp_path / "x")
    assert listed(tmp_path) == ["x.seal"]


@pytest.mark.parametrize("through", ["store", "link"])
def test_a_path_in_the_store_is_refused_and_no_pack_is_replaced(
    store: Store, tmp_path: Path, through: str
) -> None:
    (tmp_path / "link").symlink_to("store")
    pack = next((tmp_path / "store" / "packs").iterdir())
    before = {path.name: path.read_bytes() for path in pack.parent.iterdir()}
    with pytest.raises(UsageError, match="is in the store"):
        get(store, "a", tmp_path / through / "packs" / pack.name)
    assert {path.name: path.read_bytes() for path in pack.parent.iterdir()} == before


def test_damage_in_the_store_leaves_nothing(store: Store, tmp_path: Path) -> None:
    pack = next((tmp_path / "store" / "packs").iterdir())
    data = bytearray(pack.read_bytes())
    data[1000] ^= 1
    pack.write_bytes(data)
    with pytest.raises(DamagedPack, match=f"snapshot 'a': pack {pack.stem}"):
        get(store, "a", tmp_path / "x")
    assert listed(tmp_path) == []


def test_a_name_that_is_not_there_leaves_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NoSnapshot):
        get(store, "b", tmp_path / "x")
    assert listed(tmp_path) == []


def test_a_directory_that_is_missing_is_enoent(store: Store, tmp_path: Path) -> None:
    with pytest.raises(TargetError) as error:
        get(store, "a", tmp_path / "none" / "x")
    assert error.value.errno == errno.ENOENT


def test_space_is_checked_before_anything_is_written(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getting.OutputFile, "free_bytes", lambda self: 1000)
    with pytest.raises(NoSpace):
        get(store, "a", tmp_path / "x")
    assert listed(tmp_path) == []


@pytest.mark.usefixtures("same_descriptors")
def test_one_channel_reports_progress_and_leaves_no_descriptor(tmp_path: Path) -> None:
    shown: list[int] = []
    with Store.create(tmp_path / "store") as store:
        put_snapshot(store, "a", CONTENT)
        get(
            store, "a", tmp_path / "x", channels=1,
            progress=lambda state: shown.append(state.bytes_done),
        )  # fmt: skip
    assert shown == sorted(shown)
    assert shown
