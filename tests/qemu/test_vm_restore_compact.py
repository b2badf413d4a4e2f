"""A guest goes on from a compact file: QEMU runs from a private mount of it."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyqmigrate
from pyqmigrate import vm
from pyqmigrate.errors import NotSupported
from tests.harness.walking_guest import WalkingGuest

pytestmark = pytest.mark.qemu

MIB = 1 << 20


@pytest.fixture(scope="module")
def guest(module_disk: Path) -> WalkingGuest:
    """A guest that walks over 4 MiB and notices a wrong page."""
    guest = WalkingGuest(module_disk, 4 * MIB, cluster=16, spread=32)
    guest.save()
    return guest


@pytest.fixture(scope="module")
def compacted(guest: WalkingGuest, module_disk: Path) -> Path:
    """Of a snapshot without a seal: the compact file has one nevertheless."""
    pyqmigrate.compact(guest.path, module_disk / "compact")
    return module_disk / "compact"


@pytest.fixture
def from_compact(guest: WalkingGuest, compacted: Path) -> Iterator[WalkingGuest]:
    guest.name = compacted
    yield guest
    guest.name = guest.path


async def restored_and_walked(guest: WalkingGuest, mode: str) -> tuple[str, ...]:
    """Return the notes of the restore."""
    running = await vm.restore(
        str(guest.name), guest.command, mode=mode, stdin=subprocess.DEVNULL, paused=False
    )
    try:
        assert running.report.mode == mode
        await guest._walk(running.monitor, running.process.pid, guest.npages)
        return running.report.notes
    finally:
        await running.end()


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_guest_goes_on(from_compact: WalkingGuest, mode: str) -> None:
    notes = asyncio.run(restored_and_walked(from_compact, mode))
    assert mode == "load" or any("sealed" in note for note in notes)


def test_guest_goes_on_where_nothing_can_be_mounted(
    from_compact: WalkingGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NotSupported("nothing can be mounted")

    monkeypatch.setattr("pyqmigrate.mount.view.MountedView", refuse)
    asyncio.run(restored_and_walked(from_compact, "instant"))


def test_the_compact_file_has_the_guest_that_was_saved(
    guest: WalkingGuest, compacted: Path
) -> None:
    report = pyqmigrate.diff(guest.path, compacted, seals=False, fields=True)
    assert report.equal
    assert report.bytes_read > 4 * MIB
