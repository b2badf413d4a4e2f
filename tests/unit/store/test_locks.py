"""Adders and collectors keep apart, in a directory and in an object store."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.errors import TargetError
from pyqmigrate.store import locks
from pyqmigrate.store.local_place import LocalPlace
from pyqmigrate.store.locks import adding, collecting
from pyqmigrate.store.place import Place, open_place


@pytest.fixture(params=["directory", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "directory":
        found = open_place(str(tmp_path))
    else:
        pytest.importorskip("obstore")
        found = open_place(f"memory://{os.urandom(8).hex()}")
    yield found
    found.close()


def refused(place: Place, *, collector: bool) -> bool:
    try:
        with collecting(place) if collector else adding(place, wait=0):
            return False
    except TargetError as error:
        assert error.errno == errno.EBUSY
        return True


def test_adders_do_not_exclude_each_other(place: Place) -> None:
    with adding(place), adding(place, wait=0):
        assert refused(place, collector=True)
    assert not refused(place, collector=True)


def test_a_collector_excludes_all_others(place: Place) -> None:
    with collecting(place):
        assert refused(place, collector=True)
        assert refused(place, collector=False)
    assert not refused(place, collector=False)


def test_an_adder_waits_for_a_collector(place: Place) -> None:
    entered, order = threading.Event(), []

    def add() -> None:
        entered.set()
        with adding(place):
            order.append("added")

    thread = threading.Thread(target=add)
    with collecting(place):
        thread.start()
        entered.wait(10)
        thread.join(0.2)
        order.append("collected")
    thread.join(30)
    assert order == ["collected", "added"]


def test_nothing_is_left_behind(place: Place) -> None:
    with adding(place):
        pass
    with collecting(place):
        pass
    assert [entry.key for entry in place.list("locks/")] == []


def test_the_lock_of_an_adder_that_was_killed_is_gone(
    tmp_path: Path, child_environment: dict[str, str]
) -> None:
    code = (
        "import os, sys\nfrom pyqmigrate.store.locks import adding\n"
        "from pyqmigrate.store.place import open_place\n"
        "with adding(open_place(sys.argv[1])):\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=child_environment, timeout=60)
    assert not refused(open_place(str(tmp_path)), collector=True)


def memory() -> Place:
    pytest.importorskip("obstore")
    return open_place(f"memory://{os.urandom(8).hex()}")


def test_a_stale_object_does_not_count_and_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    place = memory()
    place.write_new("locks/add-0.json", b"{}")
    assert refused(place, collector=True)
    monkeypatch.setattr(locks, "STALE", -1.0)
    assert not refused(place, collector=True)
    assert [entry.key for entry in place.list("locks/")] == []


def test_a_lock_is_refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    place = memory()
    monkeypatch.setattr(locks, "_REFRESHED", 0.01)
    with adding(place):
        (entry,) = place.list("locks/")
        for _ in range(500):
            again = place.find(entry.key)
            if again is not None and again.mtime > entry.mtime:
                break
            threading.Event().wait(0.01)
        else:
            pytest.fail("the lock was not refreshed")


def test_an_adder_whose_lock_became_old_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    place = memory()
    with adding(place) as there:
        assert there.write_new("a", b"")
        clock = locks._running_clock
        monkeypatch.setattr(locks, "_running_clock", lambda: clock() + 3000)
        for write in (there.write_new, there.replace):
            with pytest.raises(TargetError) as error:
                write("b", b"")
            assert error.value.errno == errno.ESTALE
    assert place.find("b") is None


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("lock", [adding, collecting])
def test_store_that_can_only_be_read_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: Any, number: int
) -> None:
    def refused(self: LocalPlace, name: str) -> int:
        raise TargetError(number, "cannot open", tmp_path / name)

    monkeypatch.setattr(LocalPlace, "open_lock", refused)
    with (
        pytest.raises(TargetError, match=r"can only be read.*store copy") as caught,
        lock(LocalPlace(tmp_path)),
    ):
        pass
    assert caught.value.errno == number
    assert str(tmp_path) in str(caught.value)
