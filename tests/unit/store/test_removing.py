"""Snapshots are removed by name and by age."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import SnapshotError, TargetError, UsageError
from pyqmigrate.store import leases
from pyqmigrate.store.object_place import ObjectPlace
from pyqmigrate.store.removing import remove
from pyqmigrate.store.store import NoSnapshot, Store
from tests.harness.stores import image, put_snapshot

DAY = 86400 * 10**9
START = 20_000 * DAY


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "store") as found:
        for guest in (1, 2):
            for day in range(5):
                put_snapshot(
                    found, f"g{guest}-{day}", image(2), mtime_ns=START + day * DAY,
                    uuid=bytes([guest]) * 16,
                )  # fmt: skip
        yield found


def test_a_name_that_is_not_there_removes_nothing(store: Store) -> None:
    with pytest.raises(NoSnapshot, match="no snapshot 'x'"):
        remove(store, ["g1-0", "x"])
    with pytest.raises(UsageError, match="cannot be the name"):
        remove(store, ["../../etc/passwd"])
    assert len(store.names()) == 10


def test_what_is_not_kept_is_removed_for_each_guest(store: Store) -> None:
    store.write_working_set("g1-0", b"ws")
    report = remove(store, keep="2d")
    assert report.kept == ("g1-3", "g1-4", "g2-3", "g2-4")
    assert len(report.removed) == 6
    assert store.names() == list(report.kept)
    assert store.working_set("g1-0") is None


def test_a_pattern_limits_what_is_looked_at(store: Store) -> None:
    report = remove(store, keep="1d", match="g1-*")
    assert report.kept == ("g1-4",)
    assert [name for name in store.names() if name.startswith("g2")] == [
        f"g2-{day}" for day in range(5)
    ]


def test_a_dry_run_removes_nothing(store: Store) -> None:
    assert len(remove(store, keep="1d", dry_run=True).removed) == 8
    assert remove(store, ["g1-0"], dry_run=True).removed == ("g1-0",)
    assert len(store.names()) == 10


def test_names_and_rules_exclude_each_other(store: Store) -> None:
    for call in (
        lambda: remove(store),
        lambda: remove(store, ["g1-0"], keep="1d"),
        lambda: remove(store, ["g1-0"], match="g*"),
    ):
        with pytest.raises(UsageError):
            call()


def test_by_age_nothing_is_removed_if_a_snapshot_is_damaged_but_by_name_it_is(store: Store) -> None:
    assert store.place.directory is not None
    (store.place.directory / "snapshots" / "g1-2.snap").write_bytes(b"x")
    with pytest.raises(SnapshotError, match="remove 'g1-2' by its name first"):
        remove(store, keep="1d")
    assert len(store.names()) == 10
    assert remove(store, ["g1-2"]).removed == ("g1-2",)


def test_guests_without_a_uuid_that_look_alike_count_as_one_and_a_note_says_so(
    tmp_path: Path,
) -> None:
    with Store.create(tmp_path / "other") as store:
        for n, name in enumerate(("web-1", "web-2", "db")):
            put_snapshot(store, name, image(2), mtime_ns=START + n * DAY)
        report = remove(store, keep="1d", dry_run=True)
        assert report.kept == ("db",)
        assert "3 snapshots do not record the UUID" in report.notes[0]
        assert remove(store, keep="1d", match="web-*", dry_run=True).notes == ()


# ---- an object store ----


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("obstore")
    monkeypatch.setattr(leases, "_AFTER", 0.01)
    url = f"memory://{os.urandom(8).hex()}"
    with Store.create(url) as store:
        put_snapshot(store, "a", image(2))
        yield url


def locks(store: Store, count: int) -> bool:
    """Wait until there are so many locks."""
    for _ in range(500):
        if len(list(store.place.list("locks/"))) == count:
            return True
        time.sleep(0.01)
    return False


def test_a_snapshot_of_an_object_store_that_is_read_is_not_removed(remote: str) -> None:
    with Store.open(remote) as store, Store.open(remote) as other:
        with store.open_file("a"):
            assert locks(other, 1)
            assert remove(other, ["a"]).in_use == ("a",)
        assert list(other.place.list("locks/")) == []
        assert remove(other, ["a"]).removed == ("a",)


def test_the_lease_of_a_reader_that_is_gone_becomes_stale(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(remote) as store:
        store.place.write_new(f"locks/read-{'0' * 16}-a.json", b"{}")
        assert remove(store, ["a"]).in_use == ("a",)
        monkeypatch.setattr(leases, "STALE", -1.0)
        assert remove(store, ["a"]).removed == ("a",)


def test_a_reader_that_may_not_write_reads(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refused(self: ObjectPlace, key: str, data: bytes) -> None:
        asked.append(key)
        raise TargetError(errno.EACCES, "cannot write", key)

    monkeypatch.setattr(ObjectPlace, "replace", refused)
    with Store.open(remote) as store, store.open_file("a") as file:
        assert len(file.read(0, file.size)) == file.size
        while not asked:
            time.sleep(0.01)
        time.sleep(0.1)
    assert len(asked) == 1


def test_closing_a_store_ends_its_leases(remote: str) -> None:
    with Store.open(remote) as other:
        store = Store.open(remote)
        store.open_file("a")
        assert locks(other, 1)
        store.close()
        store.close()
        assert list(other.place.list("locks/")) == []
