"""Snapshots are copied between stores; an interrupted copy goes on where it was."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.store.copying import copy
from pyqmigrate.store.damage import DamagedPack
from pyqmigrate.store.store import NoSnapshot, Store
from pyqmigrate.store.verifying import verify
from tests.harness.object_store import ObjectStore, object_store
from tests.harness.stores import Added, image, put_snapshot

__all__ = ["object_store"]

CONTENTS = {name: image(200, seed=n) + image(50, seed=9) for n, name in enumerate("abc")}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "store") as found:
        added = Added()
        for name, content in CONTENTS.items():
            put_snapshot(found, name, content, added=added, frame_pages=8, pack_pages=40)
        yield found


def check(target: str, names: str = "abc") -> None:
    with Store.open(target) as there:
        assert there.names() == list(names)
        for name in names:
            with there.open_file(name) as file:
                assert bytes(file.read(0, file.size)) == CONTENTS[name]
        assert verify(there).intact


def test_an_empty_place_becomes_a_store_with_everything(store: Store, tmp_path: Path) -> None:
    store.write_working_set("b", b"ws")
    report = copy(store, str(tmp_path / "new"))
    assert report.copied == ("a", "b", "c")
    assert report.sent_packs == len(list(store.place.list("packs/")))
    check(str(tmp_path / "new"))
    with Store.open(tmp_path / "new") as there:
        assert there.working_set("b") == b"ws"


def test_only_what_is_missing_is_sent(store: Store, object_store: ObjectStore) -> None:
    target = object_store.url("p")
    first = copy(store, target, ["a"])
    object_store.requests.clear()
    second = copy(store, target, ["b", "a"])
    assert second.copied == ("b",)
    assert second.present == ("a",)
    assert second.present_packs > 0
    assert object_store.count("PUT", "/packs/") == second.sent_packs
    third = copy(store, target)
    total = first.sent_packs + second.sent_packs + third.sent_packs
    assert total == len(list(store.place.list("packs/")))
    check(target)
    object_store.requests.clear()
    last = copy(store, target)
    assert (last.copied, last.sent_packs, last.sent_bytes) == ((), 0, 0)
    assert object_store.count("PUT", "/packs/") == 0


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_pack_of_a_snapshot_that_is_there_is_sent_again(
    store: Store, tmp_path: Path, damage: str
) -> None:
    target = tmp_path / "new"
    copy(store, str(target))
    path = sorted((target / "packs").iterdir())[1]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    report = copy(store, str(target))
    assert (report.copied, report.sent_packs) == ((), 1)
    assert report.present == ("a", "b", "c")
    check(str(target))


def test_a_pack_that_only_the_target_has_is_left_alone(store: Store, tmp_path: Path) -> None:
    copy(store, str(tmp_path / "new"))
    path = next((tmp_path / "store" / "packs").iterdir())
    path.unlink()
    assert copy(store, str(tmp_path / "new")).sent_packs == 0
    check(str(tmp_path / "new"))


def test_another_snapshot_of_the_name_stops_the_copy(store: Store, tmp_path: Path) -> None:
    copy(store, str(tmp_path / "new"), ["a"])
    with Store.open(tmp_path / "new") as there:
        put_snapshot(there, "c", b"other", extents=[(0, 5)])
    with pytest.raises(UsageError, match="another snapshot 'c': nothing was copied"):
        copy(store, str(tmp_path / "new"))
    with Store.open(tmp_path / "new") as there:
        assert there.names() == ["a", "c"]


def test_a_store_with_a_key_of_its_own_is_refused(store: Store, tmp_path: Path) -> None:
    Store.create(tmp_path / "other").close()
    with pytest.raises(NotSupported, match="a key of its own"):
        copy(store, str(tmp_path / "other"))


def test_a_store_is_not_copied_to_itself(store: Store) -> None:
    with pytest.raises(UsageError, match="to itself"):
        copy(store, store.name)


def test_a_name_that_is_not_there_sends_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NoSnapshot):
        copy(store, str(tmp_path / "new"), ["a", "x"])
    with Store.open(tmp_path / "new") as there:
        assert there.names() == []


def test_a_damaged_pack_is_not_sent_and_its_snapshot_neither(store: Store, tmp_path: Path) -> None:
    pack = store.read_snapshot("b").packs[0]
    path = tmp_path / "store" / "packs" / f"{pack.hex()}.pack"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedPack, match=pack.hex()):
        copy(store, str(tmp_path / "new"), ["a", "b"])
    with Store.open(tmp_path / "new") as there:
        assert there.names() in ([], ["a"])
        assert there.place.find(f"packs/{pack.hex()}.pack") is None


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.long)])
def test_a_copy_that_is_killed_again_and_again_sends_no_pack_twice(
    kills: int, store: Store, object_store: ObjectStore, child_environment: dict[str, str]
) -> None:
    """A pack whose answer did not arrive before the kill is looked for first, not sent again."""
    target = object_store.url("p")
    object_store.delay = 0.02
    code = (
        "import sys\nfrom pyqmigrate.store import Store, copy\n"
        "copy(Store.open(sys.argv[1]), sys.argv[2], channels=2)"
    )
    rng = random.Random(5)
    for _ in range(kills):
        before = object_store.count("PUT")
        child = subprocess.Popen(
            [sys.executable, "-c", code, store.name, target], env=child_environment
        )
        deadline = time.monotonic() + 60
        wanted = before + rng.randrange(1, 5)
        while child.poll() is None and object_store.count("PUT") < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
    time.sleep(0.2)  # requests that the server has got are answered
    copy(store, target)
    check(target)
    sent = [r.path for r in object_store.requests if r.method == "PUT" and "/packs/" in r.path]
    assert len(sent) == len(set(sent))
