"""Snapshots of a store by their names: which names these are, and how they are opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pyqmigrate
from pyqmigrate.errors import TargetError, UsageError
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.view import ViewOptions, names_stored, open_view
from tests.harness.snapshots import load, save_known
from tests.harness.views import Views, make_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store")


@pytest.fixture
def views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Views:
    (tmp_path / "shown").mkdir()
    return Views(tmp_path / "shown").install(monkeypatch)


def test_stored_snapshot_is_opened_in_its_view(
    store: Path, views: Views, same_descriptors: None
) -> None:
    memory = save_known(views.directory / "monday")
    name = f"{store}#monday"
    with pyqmigrate.open_snapshot(name) as snapshot:
        assert snapshot.source.name == name
        assert snapshot.source.place == views.made[0].path
    assert (load(name)["ram"] == memory).all()
    assert all(view.closed for view in views.made)


def test_file_of_that_very_name_wins(store: Path, views: Views) -> None:
    memory = save_known(store.parent / "plain")
    (store.parent / "plain").rename(f"{store}#monday")
    assert (load(f"{store}#monday")["ram"] == memory).all()
    assert not views.made


@pytest.mark.parametrize("name", ["no-store#monday", "#monday", "store#", "store"])
def test_other_names_with_a_hash_are_files(
    store: Path, views: Views, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    with pytest.raises(TargetError, match=f"cannot open.*{name}"):
        InputFile(name)
    assert not views.made


def test_url_is_handed_on_as_it_is(views: Views) -> None:
    save_known(views.directory / "monday")
    InputFile("s3://bucket/a/b#monday").close()
    assert views.places == ["s3://bucket/a/b"]


def test_place_of_a_store_does_not_depend_on_the_current_directory(
    store: Path, views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_known(views.directory / "monday")
    monkeypatch.chdir(store.parent)
    InputFile("store#monday").close()
    assert views.places == [str(store)]


def test_missing_snapshot_is_the_error_of_the_store(store: Path, views: Views) -> None:
    with pytest.raises(TargetError, match="there is no snapshot of this name"):
        InputFile(f"{store}#tuesday")


def test_openings_at_the_same_time_share_one_view(store: Path, views: Views) -> None:
    save_known(views.directory / "monday")
    first, second = InputFile(f"{store}#monday", ahead=True), InputFile(f"{store}#monday")
    first.close()
    assert len(views.made) == 1
    assert not views.made[0].closed
    assert second.read_at(0, 4)
    second.close()
    assert views.made[0].closed


def test_failed_opening_is_tried_again(store: Path, views: Views) -> None:
    with pytest.raises(TargetError):
        InputFile(f"{store}#monday")
    save_known(views.directory / "monday")
    InputFile(f"{store}#monday").close()
    assert views.made[0].closed


def test_view_without_its_file_is_closed(
    store: Path, views: Views, monkeypatch: pytest.MonkeyPatch, same_descriptors: None
) -> None:
    save_known(views.directory / "monday")
    view = open_view(f"{store}#monday", ViewOptions())
    assert view is not None
    (views.directory / "monday").unlink()
    with pytest.raises(TargetError, match="cannot open"):
        InputFile(f"{store}#monday")
    view.close()
    assert views.made[0].closed


def test_compact_file_is_opened_in_its_view(tmp_path: Path, views: Views) -> None:
    memory = save_known(views.directory / "small.zst.shown")
    small = tmp_path / "small.zst"
    small.write_bytes(bytes.fromhex("28b52ffd") + bytes(40) + bytes.fromhex("b1ea928f"))
    assert (load(small)["ram"] == memory).all()
    assert views.places == [str(small)]


def test_other_compressed_file_has_no_view(tmp_path: Path, views: Views) -> None:
    small = tmp_path / "small.zst"
    small.write_bytes(bytes.fromhex("28b52ffd") + bytes(44))
    InputFile(small).close()
    assert not views.places


def test_names_of_stored_snapshots_are_recognized(store: Path) -> None:
    assert names_stored(f"{store}#monday")
    assert names_stored("s3://bucket#monday")
    assert not names_stored(f"{store.parent}#monday")
    Path(f"{store}#monday").touch()
    assert not names_stored(f"{store}#monday")


def test_saving_under_the_name_of_a_stored_snapshot_is_refused(store: Path, views: Views) -> None:
    with pytest.raises(UsageError, match=r"snapshot of a store, and cannot be written.*store add"):
        save_known(Path(f"{store}#monday"))
    assert not os.path.lexists(f"{store}#monday")


def test_sealing_a_stored_snapshot_is_refused(store: Path, views: Views) -> None:
    save_known(views.directory / "monday")
    with pytest.raises(UsageError, match="cannot be sealed here"):
        pyqmigrate.seal(f"{store}#monday")
    assert os.listdir(views.directory) == ["monday"]
    assert all(view.closed for view in views.made)


def test_seal_is_found_in_the_view(store: Path, views: Views) -> None:
    save_known(views.directory / "monday", seal="xxh3-128")
    check = pyqmigrate.verify_seal(f"{store}#monday")
    assert check is not None
    assert check.intact
    assert check.seal == f"{store}#monday.seal"
