"""Another client of QEMU meddles while a guest is saved."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import open_snapshot
from pyqmigrate.errors import QemuError, QemuGone, QemuRefused
from pyqmigrate.vm.outgoing import device_state
from pyqmigrate.vm.outgoing import direct as engine_direct
from pyqmigrate.vm.outgoing.transaction import SaveTransaction
from tests.harness.pattern_guest import check_pattern
from tests.harness.saving import Source, source

pytestmark = pytest.mark.qemu

WAYS = pytest.mark.parametrize("memory", ["file", "private"], ids=["ignore-shared", "devices-only"])


def meddle(monkeypatch: pytest.MonkeyPatch, guest: Source, *commands: str) -> None:
    """Another client gives these commands just before pages are copied."""
    original = engine_direct._start

    def meddled(*arguments: Any) -> Any:
        for command in commands:
            guest.vm.execute(command)
        return original(*arguments)

    monkeypatch.setattr(engine_direct, "_start", meddled)


@pytest.mark.parametrize(
    ("memory", "then", "commands"),
    [
        ("file", None, ["cont", "stop"]),
        ("file", "pause", ["cont"]),
        ("private", None, ["cont"]),
        ("private", "pause", ["cont", "stop"]),
    ],
)
def test_guest_that_was_let_run_while_its_memory_is_copied_is_not_saved(
    memory: str, then: str | None, commands: list[str], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with source(disk, memory=memory) as guest:
        meddle(monkeypatch, guest, *commands)
        with pytest.raises(QemuError, match="another client resumed the guest"):
            guest.save(disk / "snapshot", engine="direct", then=then)
        guest.assert_as_before()


@WAYS
def test_guest_that_was_let_run_between_its_devices_and_its_memory_is_not_saved(
    memory: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with source(disk, memory=memory) as guest:
        for name in ("read_devices", "read_migrated"):
            original = getattr(device_state, name)

            def meddled(*arguments: Any, original: Any = original, **options: Any) -> Any:
                guest.vm.execute("cont")
                guest.vm.execute("stop")
                return original(*arguments, **options)

            monkeypatch.setattr(device_state, name, meddled)
        with pytest.raises(QemuError, match="another client resumed the guest"):
            guest.save(disk / "snapshot", engine="direct")
        guest.assert_as_before()


@pytest.mark.parametrize("live", [False, True])
def test_guest_that_was_let_run_between_its_disks_and_its_memory_is_not_saved(
    live: bool, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SaveTransaction.take_disks
    image = disk / "image.raw"
    image.write_bytes(bytes(1 << 20))
    refused = False

    async def meddled(transaction: SaveTransaction) -> None:
        nonlocal refused
        await original(transaction)
        try:
            guest.vm.execute("cont")
        except QemuRefused:  # QEMU does not allow it at the switchover
            refused = True

    monkeypatch.setattr(SaveTransaction, "take_disks", meddled)
    drive = ("-drive", f"file={image},format=raw,if=virtio")
    with source(disk, memory="private", extra=drive) as guest:
        outcome = (
            contextlib.nullcontext()
            if live
            else pytest.raises(QemuError, match="another client resumed the guest")
        )
        method = "converge" if live else False
        with outcome:
            guest.save(disk / "snapshot", engine="qemu", with_disks=True, live=method)
        assert refused == live
        if not live:
            guest.assert_as_before()


def test_paused_guest_that_was_let_run_is_not_saved(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with source(disk, memory="private", run=False) as guest:
        meddle(monkeypatch, guest, "cont")
        with pytest.raises(QemuError, match="another client resumed the guest"):
            guest.save(disk / "snapshot", engine="direct")
        assert not (disk / "snapshot").exists()


@WAYS
def test_guest_that_was_let_run_before_is_saved(memory: str, disk: Path) -> None:
    """A pause of another client's that is over when the save stops the guest."""
    with source(disk, memory=memory) as guest:
        guest.vm.execute("stop")
        guest.vm.execute("cont")
        guest.save(disk / "snapshot", engine="direct")
        guest.files.add("snapshot")
        guest.assert_as_before()
    with open_snapshot(disk / "snapshot") as snapshot:
        ram = snapshot.blocks["pc.ram"]
        check_pattern(ram.read(0, ram.length))


@WAYS
def test_guest_that_is_quit_while_its_memory_is_copied_leaves_no_file(
    memory: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with source(disk, memory=memory) as guest:
        meddle(monkeypatch, guest, "quit")
        with pytest.raises((QemuGone, OSError)):
            guest.save(disk / "snapshot", engine="direct")
        guest.vm.process.wait(10)
        assert not [path for path in disk.iterdir() if "snapshot" in path.name]
