"""A guest goes on from a snapshot that is shown through a view: by its name in a store."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate import vm
from pyqmigrate.errors import UsageError
from pyqmigrate.io.working_set_file import read_working_set, working_set_path
from pyqmigrate.snapshot.detect import open_snapshot
from tests.harness.directories import descriptors
from tests.harness.views import Views, make_store
from tests.harness.walking_guest import PAGE, WalkingGuest

pytestmark = pytest.mark.qemu

MIB = 1 << 20


@pytest.fixture(scope="module")
def guest(module_disk: Path) -> WalkingGuest:
    guest = WalkingGuest(module_disk, 4 * MIB)
    guest.save()
    return guest


@pytest.fixture
def views(guest: WalkingGuest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Views]:
    working_set_path(guest.path).unlink(missing_ok=True)
    yield Views(guest.path.parent, pushes=True).install(monkeypatch)
    working_set_path(guest.path).unlink(missing_ok=True)


@pytest.fixture
def stored(guest: WalkingGuest, views: Views, tmp_path: Path) -> Iterator[str]:
    """The name in a store, from which the guest is restored during the test."""
    guest.name = f"{make_store(tmp_path / 'store')}#{guest.path.name}"
    yield str(guest.name)
    guest.name = guest.path


def test_guest_goes_on_and_the_view_is_closed(
    guest: WalkingGuest, stored: str, views: Views
) -> None:
    _, report = guest.seconds_to_walk()
    assert report.mode == "instant"
    assert views.made
    assert all(view.closed for view in views.made)
    assert all(view.fetched for view in views.made)


@pytest.mark.parametrize("mode", ["load", "instant"])
def test_every_mode_reads_it(guest: WalkingGuest, stored: str, mode: str) -> None:
    async def run() -> str:
        restored = await vm.restore(
            stored, guest.command, mode=mode, stdin=subprocess.DEVNULL, paused=False
        )
        try:
            await guest._walk(restored.monitor, restored.process.pid, guest.npages)
            return str(restored.report.mode)
        finally:
            await restored.end()

    assert asyncio.run(run()) == mode


def test_clones_share_one_view(
    guest: WalkingGuest, stored: str, views: Views, tmp_path: Path
) -> None:
    async def run() -> None:
        clones = await vm.clone(stored, guest.command, 3, directory=tmp_path, paused=False)
        try:
            for clone in clones:
                assert clone.vm is not None, clone.error
                await guest._walk(clone.vm.monitor, clone.vm.process.pid, guest.npages)
        finally:
            await asyncio.gather(*(clone.vm.end() for clone in clones if clone.vm is not None))

    asyncio.run(run())
    assert len(views.made) == 1
    assert views.made[0].closed


def test_what_was_read_is_recorded_and_pushed_first(
    guest: WalkingGuest, stored: str, views: Views
) -> None:
    with open_snapshot(stored) as snapshot:
        offset = snapshot.blocks["pc.ram"].pages_offset
    views.requests[:] = [(offset + 8 * MIB, 2 * PAGE), (0, PAGE), (offset, PAGE)]
    report = guest.record(0.2)
    assert str(report.path).endswith(".workingset")
    found = read_working_set(working_set_path(guest.path))
    assert found is not None
    assert [(run.first, run.npages) for run in found.working_set] == [(2048, 2), (0, 1)]
    assert not any(view.pushed for view in views.made)
    _, restored = guest.seconds_to_walk()
    assert views.made[-1].pushed == [(offset + 8 * MIB, 2 * PAGE), (offset, PAGE)]
    assert restored.recorded_pages == 3
    assert all(view.closed for view in views.made)


def test_nothing_is_recorded_from_a_copy(guest: WalkingGuest, stored: str, views: Views) -> None:
    views.pushes = False
    with pytest.raises(UsageError, match="no working set is recorded"):
        guest.record(0.2)
    assert all(view.closed for view in views.made)


def test_no_descriptor_is_left(guest: WalkingGuest, stored: str) -> None:
    guest.seconds_to_walk()
    before = descriptors()
    guest.seconds_to_walk()
    assert descriptors() == before
