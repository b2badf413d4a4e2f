"""Stores that are damaged at random or made to harm: errors only, in bounded time and memory."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import time
from pathlib import Path

import pytest

from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.format.store.config import PAGE
from pyqmigrate.store.copying import copy
from pyqmigrate.store.garbage import gc
from pyqmigrate.store.getting import get
from pyqmigrate.store.store import Store
from pyqmigrate.store.verifying import verify
from tests.harness.hostile_stores import damage_store
from tests.harness.stores import Added, image, put_pack, put_snapshot

MIB = 1 << 20
SECONDS = 20.0  # for one store, on a busy machine
MEMORY = 400 * MIB  # more than before all of them


@pytest.fixture
def store(shm: Path) -> Path:
    """A small store with plain and XOR frames, filled pages and extents."""
    with Store.create(shm / "good") as found:
        added = Added()
        content = image(60, seed=1)
        put_snapshot(found, "a", content, added=added, frame_pages=8, extents=[(0, 100)])
        first = next(iter(added.pages.items()))
        put_pack(found, [bytes(PAGE), first[0]], {0: first[1]}, {first[1]: first[0]})
        put_snapshot(found, "b", content[: 30 * PAGE] + image(20, seed=2), added=added)
    return shm / "good"


def use(path: Path, out: Path) -> None:
    """Do everything with a store that a command does. Raises PyqmigrateError."""
    with Store.open(path) as store:
        for entry in store.list():
            assert entry.head is not None or entry.error
        for name in store.names():
            with contextlib.suppress(PyqmigrateError), store.open_file(name) as file:
                for offset in (0, file.size // 2, max(0, file.size - MIB)):
                    with contextlib.suppress(PyqmigrateError):
                        assert len(file.read(offset, MIB)) <= MIB
                    data = file.next_data(offset)
                    assert data is None or offset <= data < file.size
                    assert offset <= file.next_hole(offset) <= file.size or not file.size
                sum(map(len, file.companions.values()))
            with contextlib.suppress(PyqmigrateError):
                get(store, name, out / "got", channels=1)
        verify(store, channels=2)
        with contextlib.suppress(PyqmigrateError):
            copy(store, str(out / "copy"))
        gc(store, min_age=-10)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.long)])
def test_a_hostile_store_gives_errors_only_in_bounded_time_and_memory(
    count: int, store: Path, shm: Path
) -> None:
    (shm / "precious").write_bytes(b"precious")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcomes = {"error": 0, "none": 0}
    for seed in range(count):
        rng = random.Random(seed)
        bad, out = shm / "bad", shm / "out"
        shutil.copytree(store, bad)
        out.mkdir()
        done = [damage_store(bad, rng)]
        began = time.monotonic()
        try:
            use(bad, out)
            outcomes["none"] += 1
        except PyqmigrateError:
            outcomes["error"] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {done}") from error
        assert time.monotonic() - began < SECONDS, f"seed {seed}: {done}"
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        assert used < MEMORY, f"seed {seed}: {done}"
        assert sorted(os.listdir(shm)) == ["bad", "good", "out", "precious"]
        shutil.rmtree(bad)
        shutil.rmtree(out)
    assert min(outcomes.values()) > count // 20


@pytest.mark.parametrize(
    "name",
    ["../a", "a/b", "/etc/passwd", "..", ".", ".hidden", "", "a\0b", "x" * 201, "a\nb", "é", "a b"],
)
def test_a_name_that_leaves_the_store_is_refused(store: Path, shm: Path, name: str) -> None:
    with Store.open(store) as opened:
        for call in (
            lambda: opened.open_file(name),
            lambda: opened.head(name),
            lambda: opened.working_set(name),
            lambda: opened.write_working_set(name, b"x"),
            lambda: get(opened, name, shm / "out"),
        ):
            with pytest.raises(UsageError):
                call()
    assert sorted(os.listdir(shm)) == ["good"]


def test_the_store_that_is_damaged_has_frames_of_both_kinds(store: Path) -> None:
    with Store.open(store) as opened:
        assert verify(opened).intact
        footers = [opened.packs.footer(bytes.fromhex(p.stem)) for p in (store / "packs").iterdir()]
    kinds = {kind for footer in footers for kind in footer.kinds}
    assert kinds == {0, 1}
