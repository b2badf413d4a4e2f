"""``vm save --live``: one instant, the end of the save; given up in time; the guest as found."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import open_snapshot
from pyqmigrate.errors import Cancelled, LiveSaveAbandoned, NotSupported, QemuError
from pyqmigrate.integrity.seal import stale_pages
from pyqmigrate.vm import sync
from pyqmigrate.vm.outgoing.save import save
from pyqmigrate.vm.outgoing.transaction import SaveTransaction
from pyqmigrate.vm.plan import live, settings
from pyqmigrate.vm.plan.live_option import LiveMethod, LiveOption
from tests.harness.covering import covering
from tests.harness.killed_saves import assert_old_or_whole, save_on, wait_for_touch
from tests.harness.saving import ROOT, Source, source, wait_until
from tests.harness.writing_guest import (
    GuestSetup,
    Instant,
    WritingGuest,
    check_snapshot,
    restore,
    start,
)

pytestmark = pytest.mark.qemu

MIB = 1 << 20
LARGE = 128 * MIB
METHOD: dict[str, Any] = {"live": "converge"}
KINDS = [
    ("q35", "memfd"),
    ("pc", "private"),
    ("microvm", "tmpfs"),
    ("q35", "hugetlb"),
    ("q35", "instant"),
]


def state_of(guest: WritingGuest) -> Any:
    return (
        guest.execute("query-migrate-capabilities"),
        guest.execute("query-migrate-parameters"),
        guest.execute("query-fdsets"),
        guest.execute("query-status")["status"],
    )


def assert_between(instant: Instant, before: Instant, after: Instant) -> None:
    """Torn pages aside, which ``before`` and ``after`` do not show."""
    assert before <= Instant(instant.generation, instant.written) <= after


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> float:
    """QEMU writes that many bytes a second."""
    rate = 48 * MIB
    limit = {**settings._PLAIN_FAST, "max-bandwidth": (rate, "the disk is slow")}
    monkeypatch.setattr(settings, "_PLAIN_FAST", limit)
    return rate


@pytest.mark.parametrize(
    ("machine", "memory"),
    covering(KINDS, short=[("pc", "private"), ("microvm", "tmpfs"), ("q35", "instant")]),
)
def test_file_holds_one_instant_of_the_end(machine: str, memory: str, disk: Path) -> None:
    setup = GuestSetup(machine, working_set=16 * MIB, filled=16 * MIB)
    path = disk / "snapshot"
    with start(setup, disk, memory=memory, rate=50e6) as guest:
        found = state_of(guest)
        before = guest.position()
        report = sync.connect(guest.socket).save(path, **METHOD)
        after = guest.position()
        assert state_of(guest) == found
        guest.wait_for_writes(100)
        guest.assert_memory_held()
    assert (report.method, report.instant) == (LiveMethod.CONVERGE, "end")
    assert report.downtime is not None and report.rounds is not None
    assert_between(check_snapshot(path, setup), before, after)
    assert before < check_snapshot(path, setup)  # the start is another instant
    with open_snapshot(path) as snapshot:
        snapshot.verify()
        assert stale_pages(snapshot) == {}
    for mode in ("instant", "load"):
        with restore(setup, path, disk, mode=mode) as guest:
            guest.wait_for_writes()
            guest.assert_memory_held()


@pytest.mark.long
@pytest.mark.parametrize(("machine", "memory"), KINDS)
def test_series_of_live_saves(machine: str, memory: str, disk: Path) -> None:
    setup = GuestSetup(machine, ram=256 * MIB, working_set=32 * MIB, filled=64 * MIB)
    path = disk / "snapshot"
    with start(setup, disk, memory=memory, rate=50e6) as guest:
        found = state_of(guest)
        for number in range(6):
            before = guest.position()
            sync.connect(guest.socket).save(path, **METHOD)
            assert_between(check_snapshot(path, setup), before, guest.position())
            assert state_of(guest) == found
            with restore(setup, path, disk, mode=("instant", "load")[number % 2]) as restored:
                restored.wait_for_writes()
                restored.assert_memory_held()


def test_disks_are_of_the_instant_that_the_file_holds(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = GuestSetup(working_set=16 * MIB)
    path, image = disk / "snapshot", disk / "disk.raw"
    image.write_bytes(b"")
    os.truncate(image, 64 * MIB)
    drive = ["-drive", f"file={image},format=raw,if=virtio,id=d0"]
    original = SaveTransaction.take_disks
    seen: list[Any] = []

    async def watched(transaction: SaveTransaction) -> None:
        seen.append(guest.position())
        await original(transaction)
        seen.append(guest.position())
        seen.append(guest.execute("query-status")["status"])

    monkeypatch.setattr(SaveTransaction, "take_disks", watched)
    with start(setup, disk, extra=drive, rate=50e6) as guest:
        sync.connect(guest.socket).save(path, with_disks=True, **METHOD)
        [device] = guest.execute("query-block")
        assert device["inserted"]["backing_file"] == str(image)
        guest.wait_for_writes(100)
    instant = check_snapshot(path, setup)
    assert seen[0] == seen[1] and seen[2] == "finish-migrate"
    # A page counts once the guest has noted that it wrote it.
    following = seen[0].generation, seen[0].written + 1
    assert (instant.generation, instant.written) in (
        (seen[0].generation, seen[0].written),
        following,
    )
    for mode in ("instant", "load"):
        with restore(
            setup, path, disk, mode=mode, extra=drive, disks_as_they_are=True, paused=False
        ) as guest:
            guest.wait_for_writes()
            guest.assert_memory_held()


def test_disks_that_take_longer_than_promised_let_the_guest_go(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SaveTransaction.take_disks

    async def slow(transaction: SaveTransaction) -> None:
        await original(transaction)
        await asyncio.sleep(0.2)

    monkeypatch.setattr(SaveTransaction, "take_disks", slow)
    image = disk / "disk.raw"
    image.write_bytes(b"")
    os.truncate(image, 64 * MIB)
    drive = ("-drive", f"file={image},format=raw,if=virtio,id=d0")
    with source(disk, memory="private", extra=drive) as guest:
        with pytest.raises(LiveSaveAbandoned, match="snapshots of the disks took"):
            guest.save(disk / "snapshot", with_disks=True, max_pause=0.1, **METHOD)
        guest.assert_as_before()


def test_guest_that_writes_faster_than_the_disk_is_given_up_in_time(
    disk: Path, slow_disk: float
) -> None:
    setup = GuestSetup(working_set=96 * MIB)
    with start(setup, disk) as guest:
        found = state_of(guest)
        started = time.monotonic()
        with pytest.raises(LiveSaveAbandoned, match="changes memory about as fast"):
            sync.connect(guest.socket).save(disk / "snapshot", **METHOD)
        seconds = time.monotonic() - started
        assert seconds < 3 * setup.ram / slow_disk + 2  # to inspect the guest, to roll back
        assert state_of(guest) == found
        assert not list(disk.glob("*snapshot*"))
        guest.wait_for_writes(1000)
        guest.assert_memory_held()


def test_live_save_goes_on_with_the_next_method(
    disk: Path, slow_disk: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = (LiveMethod.BACKGROUND, LiveMethod.PRECOPY)  # they are as good for a guest so small
    options = {method: LiveOption(method, (), 0.1, "it is slow") for method in others}
    later = {method: lambda *_, option=option: option for method, option in options.items()}
    known = live._option
    monkeypatch.setattr(live, "_option", lambda method: later.get(method) or known(method))
    setup = GuestSetup(working_set=96 * MIB)
    path = disk / "snapshot"
    with start(setup, disk) as guest:
        found = state_of(guest)
        report = sync.connect(guest.socket).save(path, live=True)
        assert state_of(guest) == found
    assert report.method not in (None, LiveMethod.CONVERGE)
    assert any("converge was abandoned: the guest changes" in note for note in report.notes)
    assert "of the methods left" in report.method_why
    check_snapshot(path, setup)


def test_pause_that_cannot_be_kept_is_an_error_that_says_what_is_possible(
    disk: Path, slow_disk: float
) -> None:
    setup = GuestSetup(working_set=96 * MIB)
    with start(setup, disk) as guest:
        found = state_of(guest)
        with pytest.raises(LiveSaveAbandoned) as raised:
            sync.connect(guest.socket).save(disk / "snapshot", live=True, max_pause=0.006)
        notes = "".join(raised.value.__notes__)
        assert "precopy was not tried: it pauses the guest for about" in notes
        assert "6 ms are allowed" in notes
        assert state_of(guest) == found


def test_pause_that_no_method_keeps_is_refused_before_qemu_is_changed(disk: Path) -> None:
    with source(disk) as guest:
        with pytest.raises(NotSupported, match="converge: to stop the guest"):
            guest.save(disk / "snapshot", live=True, max_pause=0.001)
        guest.assert_as_before()


def test_pause_that_was_longer_than_promised_is_noted(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SaveTransaction.resume

    async def late(transaction: SaveTransaction) -> None:
        await asyncio.sleep(0.1)
        await original(transaction)

    monkeypatch.setattr(SaveTransaction, "resume", late)
    with source(disk) as guest:
        report = guest.save(disk / "snapshot", max_pause=0.02, **METHOD)
        assert any("longer than promised" in note for note in report.notes)
        guest.files.add("snapshot")
        guest.assert_as_before()


def test_guest_that_does_not_run_needs_no_live_method(disk: Path) -> None:
    with source(disk, run=False) as guest:
        report = guest.save(disk / "snapshot", live=True, max_pause=0.02)
        assert report.method is None
        assert any("does not run" in note for note in report.notes)
        assert guest.status() == "paused"


def test_command_names_the_method_and_the_instant(disk: Path) -> None:
    with source(disk) as guest:
        process = guest.start_save(disk / "snapshot", "--json", "--live", "--max-pause", "50")
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        data = json.loads(output)
        assert data["method"] in [str(method) for method in LiveMethod]
        assert data["method_why"] and data["instant"] in ("start", "end")
        assert {"rounds", "slowdown", "base", "changed_pages"} <= data.keys()
        check = [sys.executable, "-m", "pyqmigrate", "vm", "check", "--qmp", str(guest.socket)]
        result = subprocess.run(
            [*check, "--json", "--method", "converge"], cwd=ROOT, capture_output=True, text=True
        )
        checked = json.loads(result.stdout)
        assert (checked["method"], checked["instant"]) == ("converge", "end")
        [option] = checked["methods"]
        assert option["possible"] and option["expected_pause"] == 0.02 and option["basis"]
        text = subprocess.run([*check, "--live"], cwd=ROOT, capture_output=True, text=True).stdout
        assert "live      converge: a pause of about 20 ms" in text


def test_running_guest_survives_a_full_disk(disk: Path) -> None:
    with source(disk) as guest:
        code, errors, left = save_on(guest, "tmpfs -o size=8m", "--method", "converge", blind=True)
        assert (code, left) == (3, []), errors
        assert "No space left" in errors
        guest.assert_as_before()


def test_cancelled_save_leaves_the_guest_as_it_was(disk: Path) -> None:
    async def cancelled(guest: Source, after: float) -> bool:
        task = asyncio.ensure_future(save(guest.socket, disk / "snapshot", **METHOD))
        await asyncio.sleep(after)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return True
        return False

    with source(disk, length=LARGE) as guest:
        guest.ram.memory[LARGE // 2 :] = b"x" * (LARGE // 2)
        outcomes = []
        for after in (0.05, 0.25, 0.5):
            outcomes.append(asyncio.run(cancelled(guest, after)))
            if not outcomes[-1]:
                break
            guest.assert_as_before()
        assert any(outcomes)


@pytest.mark.parametrize(
    ("memory", "kills"),
    covering([("memfd", 1), ("memfd", 50), ("private", 50)], short=[("memfd", 1)]),
)
def test_guest_survives_that_the_command_is_killed(memory: str, kills: int, disk: Path) -> None:
    choose = random.Random(kills)
    with source(disk, memory=memory, length=LARGE) as guest:
        guest.ram.memory[LARGE // 2 :] = b"x" * (LARGE // 2)
        (disk / "snapshot").write_bytes(b"what was there before")
        guest.files.add("snapshot")
        for _ in range(kills):
            process = guest.start_save(disk / "snapshot", "--method", "converge")
            wait_for_touch(guest)
            time.sleep(choose.uniform(0, 0.5))
            process.kill()
            process.communicate()
            guest.assert_as_before(within=30)
            assert_old_or_whole(disk / "snapshot")


def test_other_clients_migration_before_the_save_is_left_alone(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SaveTransaction.apply

    async def meddled(transaction: SaveTransaction, changes: Any) -> None:
        guest.vm.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
        guest.vm.execute("migrate", {"uri": f"file:{disk / 'other'}"})
        guest.files.add("other")
        await original(transaction, changes)

    monkeypatch.setattr(SaveTransaction, "apply", meddled)
    with source(disk, memory="private") as guest:
        with pytest.raises(QemuError, match="under way"):
            guest.save(disk / "snapshot", live=True)  # and tries no other method
        deadline = time.monotonic() + 10
        while (status := guest.vm.execute("query-migrate")["status"]) == "setup":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert status == "active"
        guest.vm.execute("migrate_cancel")
        guest.wait_for_count(guest.count() + 2)


def test_other_client_that_cancels_the_migration_ends_the_save(
    disk: Path, slow_disk: float
) -> None:
    with source(disk, length=LARGE) as guest:

        async def cancelled() -> None:
            task = asyncio.ensure_future(save(guest.socket, disk / "snapshot", live=True))
            status = "none"
            while status != "active" and not task.done():
                await asyncio.sleep(0.001)
                status = guest.vm.execute("query-migrate").get("status")
            guest.vm.execute("migrate-set-parameters", {"max-bandwidth": 10_000})
            await asyncio.sleep(0.5)  # QEMU 10.0.2 may crash if its channels have work
            guest.vm.execute("migrate_cancel")
            await task

        guest.ram.memory[LARGE // 2 :] = b"x" * (LARGE // 2)
        with pytest.raises(Cancelled):
            asyncio.run(cancelled())
        guest.assert_as_before()


def test_qemu_that_is_killed_leaves_no_file(disk: Path) -> None:
    with source(disk, length=LARGE) as guest:
        process = guest.start_save(disk / "snapshot", "--method", "converge")
        wait_for_touch(guest)
        guest.vm.process.kill()
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0 and b"QEMU" in errors
        wait_until(lambda: guest._guardians() == [], "a guardian is left")
        assert not (disk / "snapshot").exists()
