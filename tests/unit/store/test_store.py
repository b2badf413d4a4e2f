"""A store is created, opened and listed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pyqmigrate.errors import NotSupported, SnapshotError, TargetError, UsageError
from pyqmigrate.format.store.keys import snapshot_key
from pyqmigrate.store import Store
from pyqmigrate.store.removing import remove
from tests.harness.object_store import ObjectStore, object_store
from tests.harness.stores import image, put_snapshot

__all__ = ["object_store"]


def test_a_new_store_is_empty_and_its_key_is_random(tmp_path: Path) -> None:
    with Store.create(tmp_path / "a") as one, Store.create(tmp_path / "b") as two:
        assert one.names() == []
        assert one.config.key != two.config.key
    with Store.open(tmp_path / "a") as again:
        assert again.config == one.config


def test_only_its_user_can_read_a_new_store(tmp_path: Path) -> None:
    Store.create(tmp_path / "a").close()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "store.json").stat().st_mode & 0o777 == 0o600


def test_a_directory_with_anything_in_it_does_not_become_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UsageError, match="it is not empty"):
        Store.create(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_store_is_not_created_twice(tmp_path: Path, object_store: ObjectStore) -> None:
    for target in (str(tmp_path / "a"), object_store.url("p")):
        Store.create(target).close()
        with pytest.raises(UsageError, match="a store is there already"):
            Store.create(target)


def test_a_directory_without_a_store_is_a_usage_error_that_names_the_verb(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a store.*pyqmigrate store create"):
        Store.open(tmp_path)
    with pytest.raises(TargetError) as error:
        Store.open(tmp_path / "none")
    assert error.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", SnapshotError),
        (b"{}", SnapshotError),
        (b"[" * 100000, SnapshotError),
        (bytes(1 << 17), SnapshotError),
        (b'{"format": "pyqmigrate-store", "version": 2}', NotSupported),
    ],
)
def test_a_damaged_configuration_is_refused(
    tmp_path: Path, content: bytes, kind: type[Exception]
) -> None:
    (tmp_path / "store.json").write_bytes(content)
    with pytest.raises(kind):
        Store.open(tmp_path)


def test_a_configuration_that_is_a_link_is_refused(tmp_path: Path) -> None:
    Store.create(tmp_path / "a").close()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "store.json").symlink_to("../a/store.json")
    with pytest.raises(TargetError, match="symbolic link"):
        Store.open(tmp_path / "b")


def test_snapshots_are_listed_by_name_also_damaged_ones(tmp_path: Path) -> None:
    with Store.create(tmp_path / "a") as store:
        for name in ("c", "a", "b"):
            put_snapshot(store, name, image(3, seed=ord(name)))
        document = tmp_path / "a" / "snapshots" / "b.snap"
        document.write_bytes(document.read_bytes()[:100])
        (tmp_path / "a" / "snapshots" / "other file").write_bytes(b"")
        entries = store.list()
    assert [entry.name for entry in entries] == ["a", "b", "c"]
    assert [entry.head is None for entry in entries] == [False, True, False]
    assert "first line does not end" in (entries[1].error or "")
    assert entries[0].head is not None
    assert entries[0].head.size == 3 * 4096


def test_a_document_under_another_name_is_damaged(tmp_path: Path) -> None:
    with Store.create(tmp_path / "a") as store:
        put_snapshot(store, "a", image(3))
        folder = tmp_path / "a" / "snapshots"
        (folder / "b.snap").write_bytes((folder / "a.snap").read_bytes())
        with pytest.raises(SnapshotError, match="it was stored as 'a'"):
            store.read_snapshot("b")


def test_a_store_in_an_object_store_is_the_same(object_store: ObjectStore) -> None:
    content = image(300, seed=4)
    with Store.create(object_store.url("deep/prefix")) as store:
        put_snapshot(store, "a", content, frame_pages=8, pack_pages=50)
        store.write_working_set("a", b"ws")
    with Store.open(object_store.url("deep/prefix/")) as store:
        assert store.names() == ["a"]
        with store.open_file("a") as file:
            assert bytes(file.read(0, len(content))) == content
            assert file.companions[".workingset"] == b"ws"


def test_a_snapshot_that_is_read_is_not_removed(tmp_path: Path) -> None:
    with Store.create(tmp_path / "a") as store:
        put_snapshot(store, "a", image(3))
        with store.open_file("a"), Store.open(tmp_path / "a") as other:
            assert remove(other, ["a"]).in_use == ("a",)
            assert store.names() == ["a"]
        assert remove(store, ["a"]).removed == ("a",)
        assert store.names() == []
        assert store.place.find(snapshot_key("a")) is None
