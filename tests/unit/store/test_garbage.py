"""Garbage is removed, and never what a snapshot or an adder needs."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate import RamBlock, save
from pyqmigrate.errors import SnapshotError, TargetError
from pyqmigrate.store.garbage import gc
from pyqmigrate.store.locks import adding
from pyqmigrate.store.removing import remove
from pyqmigrate.store.store import Store
from pyqmigrate.store.verifying import verify
from tests.harness.object_store import ObjectStore, object_store
from tests.harness.snapshots import ram
from tests.harness.stores import Added, image, put_pack, put_snapshot

__all__ = ["object_store"]

HOUR = 3600


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Snapshots a and b share a pack, and each has one of its own."""
    with Store.create(tmp_path / "store") as found:
        added = Added()
        shared = image(40, seed=1)
        put_snapshot(found, "a", shared, added=added)
        put_snapshot(found, "a2", shared + image(20, seed=2), added=added)
        put_snapshot(found, "b", shared + image(20, seed=3), added=added)
        yield found


def age(store: Store, seconds: float = 2 * HOUR) -> None:
    """Make all packs and working sets old."""
    assert store.place.directory is not None
    for path in store.place.directory.rglob("*"):
        then = time.time() - seconds
        os.utime(path, (then, then))


def packs(store: Store) -> set[str]:
    return {entry.key for entry in store.place.list("packs/")}


def test_what_snapshots_need_stays(store: Store) -> None:
    age(store)
    report = gc(store)
    assert (report.snapshot_count, report.removed_packs, report.kept_packs) == (3, 0, 3)
    assert verify(store).intact


def test_packs_of_removed_snapshots_are_removed_but_not_shared_ones(store: Store) -> None:
    own = set(store.read_snapshot("b").packs) - set(store.read_snapshot("a").packs)
    age(store)
    store.write_working_set("b", b"ws")
    remove(store, ["b"])
    before = packs(store)
    report = gc(store)
    assert before - packs(store) == {f"packs/{pack.hex()}.pack" for pack in own}
    assert report.removed_packs == 1
    assert report.removed_bytes > 0
    assert verify(store).intact
    assert store.names() == ["a", "a2"]


def test_the_working_set_of_a_removed_snapshot_is_removed_when_it_is_old(store: Store) -> None:
    store.write_working_set("a", b"ws")
    store.write_working_set("gone", b"ws")
    assert gc(store).removed_working_sets == 0
    age(store)
    assert gc(store).removed_working_sets == 1
    assert store.working_set("a") == b"ws"
    assert store.working_set("gone") is None


def test_young_packs_stay(store: Store) -> None:
    age(store)
    put_pack(store, [os.urandom(4096)])
    report = gc(store)
    assert (report.removed_packs, report.young_packs) == (0, 1)
    age(store, HOUR - 60)
    assert gc(store).removed_packs == 0
    age(store, HOUR + 60)
    assert gc(store).removed_packs == 1


def test_packs_from_the_future_stay(store: Store) -> None:
    put_pack(store, [os.urandom(4096)])
    age(store, -5 * HOUR)
    assert gc(store).removed_packs == 0


def test_a_dry_run_removes_nothing(store: Store) -> None:
    remove(store, ["b"])
    age(store)
    before = packs(store)
    assert gc(store, dry_run=True).removed_packs == 1
    assert packs(store) == before


def test_nothing_is_removed_if_a_snapshot_is_damaged(store: Store) -> None:
    remove(store, ["b"])
    age(store)
    assert store.place.directory is not None
    path = store.place.directory / "snapshots" / "a2.snap"
    path.write_bytes(path.read_bytes()[:-1])
    before = packs(store)
    with pytest.raises(SnapshotError) as error:
        gc(store)
    assert "nothing was removed" in "".join(error.value.__notes__)
    assert packs(store) == before


def test_nothing_is_removed_while_a_snapshot_is_added(store: Store) -> None:
    remove(store, ["b"])
    age(store)
    with adding(store.place), pytest.raises(TargetError) as error:
        gc(store)
    assert error.value.errno == errno.EBUSY
    assert gc(store).removed_packs == 1


def test_a_collector_waits_for_an_adder(store: Store) -> None:
    held, release = threading.Event(), threading.Event()

    def add() -> None:
        with adding(store.place):
            held.set()
            release.wait(30)

    thread = threading.Thread(target=add)
    thread.start()
    held.wait(30)
    threading.Timer(0.2, release.set).start()
    gc(store, wait=30)
    assert release.is_set()
    thread.join()


def test_other_files_are_left_alone(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "store" / "packs"
    (folder / "README").write_bytes(b"mine")
    (folder / ".0123.pack.abcd.partial").write_bytes(b"of a killed writer")
    (folder / ".hidden").write_bytes(b"mine")
    age(store)
    gc(store)
    assert {path.name for path in folder.iterdir() if not path.name.endswith(".pack")} == {
        "README",
        ".hidden",
    }


def test_a_link_to_another_file_is_refused_and_nothing_is_removed(
    store: Store, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "store" / "packs" / f"{'0' * 32}.pack").symlink_to(tmp_path / "precious")
    before = os.listdir(tmp_path / "store" / "packs")
    with pytest.raises(TargetError, match="symbolic link"):
        gc(store)
    assert sorted(os.listdir(tmp_path / "store" / "packs")) == sorted(before)
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_garbage_of_an_object_store_is_removed_by_its_clock(object_store: ObjectStore) -> None:
    with Store.create(object_store.url("p")) as store:
        put_snapshot(store, "a", image(10, seed=1))
        put_snapshot(store, "b", image(10, seed=2))
        remove(store, ["b"])
        assert gc(store).young_packs == 1
        report = gc(store, min_age=-10)
        assert report.removed_packs == 1
        assert verify(store).intact
        assert [entry.key for entry in store.place.list("locks/")] == []


# ---- adders and collectors that are killed ----

# Forks a process for each job of a line, and waits for them after the next line: the start of a
# program takes longer than the work, and ends of processes that are not awaited keep their numbers.
WORK = """
import json, os, sys
from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.store import Store, add, gc
def work(verb, place, *rest):
    try:
        with Store.open(place) as store:
            if verb == "add":
                add(store, *rest, parent=None)
            else:
                gc(store, min_age=-1, wait=5)  # as if all packs were old
    except PyqmigrateError as error:
        with open(f"{place}.said", "a") as said:
            print(error, file=said)
        return 3
    return 0
for line in sys.stdin:
    children = []
    for job in json.loads(line):
        child = os.fork()
        if not child:
            code = 1
            try:
                code = work(*job)
            finally:
                os._exit(code)
        children.append(child)
    print(json.dumps(children), flush=True)
    sys.stdin.readline()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)
"""


@pytest.fixture
def forking(child_environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", WORK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment,
    ) as program:
        yield program
        assert program.stdin is not None
        program.stdin.close()


@pytest.mark.parametrize("rounds", [8, pytest.param(500, marks=pytest.mark.long)])
@pytest.mark.timeout(3000)
def test_whatever_is_killed_no_snapshot_is_ever_broken(
    rounds: int, tmp_path: Path, forking: subprocess.Popen[str]
) -> None:
    """Two adders and a collector at once, of which up to two are killed at a random moment."""
    rng = random.Random(11)
    files = []
    for n in range(6):
        path = tmp_path / f"{n}.mapped"
        memory = ram(400, seed=n // 2)  # two of a kind share most pages
        memory[: 4096 * 20] = n
        save(path, [RamBlock("ram", memory)])
        files.append(path)
    ask, answers = forking.stdin, forking.stdout
    assert ask is not None
    assert answers is not None
    ended = {0: 0, 3: 0, -signal.SIGKILL: 0}
    with Store.create(tmp_path / "store") as store:
        for number in range(rounds):
            jobs = [["add", store.name, str(rng.choice(files)), f"s{number}-{k}"] for k in range(2)]
            ask.write(json.dumps([*jobs, ["gc", store.name]]) + "\n")
            ask.flush()
            for child in rng.sample(json.loads(answers.readline()), rng.randrange(3)):
                time.sleep(rng.random() * 0.05)
                os.kill(child, signal.SIGKILL)
            ask.write("\n")
            ask.flush()
            for code in json.loads(answers.readline()):
                ended[code] += 1  # a KeyError: it failed
            report = verify(store)
            assert report.intact, report.damages
            names = store.names()
            if len(names) > 4:
                remove(store, rng.sample(names, 3))
    assert ended[0]
    assert ended[-signal.SIGKILL]
    said = tmp_path / "store.said"
    if said.exists():
        assert all("at work in the store" in line for line in said.read_text().splitlines())
