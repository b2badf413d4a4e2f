"""Objects that are requested before they are needed."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.errors import TargetError
from pyqmigrate.store import early_reads
from pyqmigrate.store.early_reads import EarlyReads
from pyqmigrate.store.local_place import LocalPlace
from pyqmigrate.store.place import Place, open_place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    found = open_place(str(tmp_path), create=True)
    found.write_new("a", b"the first")
    found.write_new("b", b"the second")
    return found


def test_all_are_requested_at_once_and_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=10)
    asked: list[str] = []
    read = LocalPlace.read

    def meet(self: LocalPlace, key: str, *where: Any) -> Any:
        asked.append(key)
        together.wait()
        return read(self, key, *where)

    monkeypatch.setattr(LocalPlace, "read", meet)
    early = EarlyReads(place, ["a", "b"])
    assert bytes(early.read("a")) == b"the first"
    assert bytes(early.read("b", 4, 3)) == b"sec"
    assert bytes(early.read("b", 4)) == b"second"
    assert sorted(asked) == ["a", "b"]


def test_missing_one_is_an_error_where_it_is_needed(place: Place) -> None:
    early = EarlyReads(place, ["a", "none"])
    with pytest.raises(TargetError) as caught:
        early.read("none")
    assert caught.value.errno == errno.ENOENT
    place.write_new("none", b"there now")
    assert bytes(early.read("none")) == b"there now"


def test_what_was_read_is_not_kept_for_long(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_reads, "_FRESH", 0.0)
    early = EarlyReads(place, ["a"])
    place.replace("a", b"another")
    assert bytes(early.read("a")) == b"another"


def test_change_through_it_is_seen(place: Place) -> None:
    early = EarlyReads(place, ["a", "b"])
    early.replace("a", b"another")
    assert bytes(early.read("a")) == b"another"
    early.delete("b")
    assert early.find("b") is None
    with pytest.raises(TargetError):
        early.read("b")


def test_larger_one_than_is_kept_is_read_in_parts(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early_reads, "_MOST", 4)
    early = EarlyReads(place, ["a"])
    assert bytes(early.read("a")) == b"the first"
    assert early.name == place.name
    assert [entry.key for entry in early.list("")] == ["a", "b"]
    assert bytes(early.read_end("a", 5)[0]) == b"first"
