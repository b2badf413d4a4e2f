"""A guest goes on from a snapshot of a store that is far away: a real server of objects on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyqmigrate
from pyqmigrate import vm
from pyqmigrate.io.input import InputFile
from pyqmigrate.store.store import Store
from tests.harness.mounted_guests import PATIENCE, keepers, worker_of
from tests.harness.object_store import ObjectStore, object_store
from tests.harness.stored_guests import store_file
from tests.harness.walking_guest import WalkingGuest

__all__ = ["object_store"]

pytestmark = pytest.mark.qemu

MIB = 1 << 20
DELAY = 0.02  # seconds for each request


@pytest.fixture(scope="module")
def guest(module_disk: Path) -> WalkingGuest:
    guest = WalkingGuest(module_disk, 4 * MIB, cluster=16, spread=32)
    guest.save()
    pyqmigrate.seal(guest.path)
    return guest


@pytest.fixture
def stored(
    guest: WalkingGuest, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The name of the snapshot, whose store answers late."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    (tmp_path / "runtime").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    url = object_store.url("guests")
    with Store.create(url) as store:
        store_file(store, guest.path, "monday", pack_pages=300)
    object_store.delay = DELAY
    guest.name = f"{url}#monday"
    yield guest.name
    object_store.delay = 0
    guest.name = guest.path


def packs_read(object_store: ObjectStore) -> int:
    """Return how many requests for packs there were since the last call."""
    count = object_store.count("GET", "/packs/")
    object_store.requests.clear()
    return count


def test_guest_goes_on_and_packs_are_fetched_once(
    guest: WalkingGuest, stored: str, object_store: ObjectStore, tmp_path: Path
) -> None:
    object_store.requests.clear()
    guest.seconds_to_walk()
    assert packs_read(object_store)
    assert os.listdir(tmp_path / "caches" / "pyqmigrate" / "packs")
    guest.seconds_to_walk()
    assert not packs_read(object_store)


def test_cache_is_where_it_is_wanted(guest: WalkingGuest, stored: str, tmp_path: Path) -> None:
    guest.seconds_to_walk(cache=tmp_path / "here")
    assert os.listdir(tmp_path / "here")
    assert not (tmp_path / "caches").exists()


def test_all_of_it_is_fetched_while_the_guest_waits(
    guest: WalkingGuest, stored: str, object_store: ObjectStore
) -> None:
    async def run() -> None:
        paused = await vm.restore(
            stored, guest.command, mode="instant", stdin=subprocess.DEVNULL, paused=True
        )
        try:
            with contextlib.closing(InputFile(stored)) as source:
                for _ in range(200):
                    before = len(object_store.requests)
                    await asyncio.sleep(0.3)
                    if len(object_store.requests) == before:
                        break
                packs_read(object_store)
                # What follows comes from the cache.
                for offset in range(0, source.size, MIB):
                    await asyncio.to_thread(os.pread, source.fd, MIB, offset)
            assert not packs_read(object_store)
        finally:
            await paused.end()

    asyncio.run(run())


def test_working_set_is_kept_in_the_store(
    guest: WalkingGuest, stored: str, object_store: ObjectStore, tmp_path: Path
) -> None:
    report = guest.record(1.5)
    assert str(report.path) == f"{object_store.url('guests')}/working-sets/monday.ws"
    _, restored = guest.seconds_to_walk(cache=tmp_path / "empty")
    assert restored.recorded_pages == report.pages > 0
    assert not any("working set" in note for note in restored.notes)


def test_outage_stops_the_guest_and_does_not_end_it(
    guest: WalkingGuest, stored: str, object_store: ObjectStore, tmp_path: Path
) -> None:
    cache = tmp_path / "caches" / "pyqmigrate" / "packs"

    async def run() -> None:
        paused = await vm.restore(
            stored, guest.command, mode="instant", stdin=subprocess.DEVNULL, paused=True
        )
        try:
            with contextlib.closing(InputFile(stored)) as source:
                worker = await asyncio.to_thread(worker_of, source)
            # So that to look at the guest's progress does not wait for the store.
            await guest._walk(paused.monitor, paused.process.pid, 0)
            object_store.stop()
            try:
                # Nothing that was read is kept anywhere but in the kernel.
                os.kill(worker, signal.SIGKILL)
                for pack in cache.iterdir():
                    pack.unlink()
                await paused.monitor.execute("cont")
                walking = asyncio.create_task(
                    guest._walk(paused.monitor, paused.process.pid, guest.npages)
                )
                await asyncio.sleep(7)
                assert paused.process.poll() is None
                assert not walking.done()
                messages = await paused.store_messages()
            finally:
                object_store.start()
            await walking
            assert any("cannot serve" in text or "waits" in text for text in messages)
        finally:
            await paused.end()

    asyncio.run(run())


def test_guest_that_is_killed_in_an_outage_leaves_nothing(
    guest: WalkingGuest, stored: str, object_store: ObjectStore, tmp_path: Path
) -> None:
    cache = tmp_path / "caches" / "pyqmigrate" / "packs"

    async def run() -> None:
        paused = await vm.restore(
            stored, guest.command, mode="instant", stdin=subprocess.DEVNULL, paused=True
        )
        try:
            with contextlib.closing(InputFile(stored)) as source:
                worker = await asyncio.to_thread(worker_of, source)
            object_store.stop()
            os.kill(worker, signal.SIGKILL)
            for pack in cache.iterdir():
                pack.unlink()
            await paused.monitor.execute("cont")
            await asyncio.sleep(1)
            assert keepers(tmp_path / "runtime")
            paused.process.kill()
            await paused.wait()
        finally:
            await paused.end()

    try:
        asyncio.run(run())
        deadline = time.monotonic() + PATIENCE
        while keepers(tmp_path / "runtime"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        object_store.start()
