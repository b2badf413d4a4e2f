"""Saves by ``precopy``: one instant, a short pause, and the guest as it was found whatever fails."""

from __future__ import annotations

import asyncio
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import open_snapshot
from pyqmigrate.errors import (
    GuestMemoryError,
    LiveSaveAbandoned,
    NoSpace,
    QemuError,
    QemuGone,
    UsageError,
)
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.integrity.verify import verify_seal
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.companion_file import identify_snapshot
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.page_copies import PageCopies
from pyqmigrate.io.page_digests import PageDigests
from pyqmigrate.io.page_table_file import page_table_path, read_page_table
from pyqmigrate.vm import sync
from pyqmigrate.vm.guest.inspect import GuestInfo, inspect
from pyqmigrate.vm.outgoing import device_state, precopy
from pyqmigrate.vm.outgoing.device_state import DeviceStateRefused
from pyqmigrate.vm.outgoing.report import VmSaveReport
from pyqmigrate.vm.outgoing.save import save
from pyqmigrate.vm.outgoing.transaction import SaveTransaction
from pyqmigrate.vm.plan import live_precopy
from pyqmigrate.vm.plan.blockers import DeviceStateMethod
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.as_found import AsFound
from tests.harness.covering import covering
from tests.harness.gaps import GapRecorder
from tests.harness.saving import Source, source
from tests.harness.writing_guest import (
    MEMORY_KINDS,
    GuestSetup,
    WritingGuest,
    check_snapshot,
    restore,
    start,
)

pytestmark = pytest.mark.qemu

SMALL = GuestSetup(ram=64 << 20, working_set=16 << 20, filled=24 << 20)
METHOD = {"live": "precopy"}
OLD = b"what was there before"


def save_live(guest: WritingGuest | Source, path: Path, **options: Any) -> VmSaveReport:
    return asyncio.run(save(guest.socket, path, **{**METHOD, **options}))


def assert_saved(path: Path, setup: GuestSetup, *modes: str) -> None:
    """The file holds one instant, and the guest goes on from it."""
    check_snapshot(path, setup)
    for mode in modes:
        with restore(setup, path, path.parent, mode=mode) as guest:
            guest.wait_for_writes()
            guest.assert_memory_held()


@pytest.mark.parametrize("memory", covering(MEMORY_KINDS, short=["private", "hugetlb", "instant"]))
def test_guest_that_writes_at_full_speed_is_saved_at_one_instant(memory: str, disk: Path) -> None:
    with start(SMALL, disk, memory=memory) as guest:
        report = save_live(guest, disk / "snapshot")
        guest.wait_for_writes()
        guest.assert_memory_held()
    assert (report.method, report.instant, report.engine) == ("precopy", "end", "direct")
    assert report.rounds is not None and report.rounds >= 2
    assert_saved(disk / "snapshot", SMALL, "instant", "load")


@pytest.mark.parametrize("machine", covering(["pc", "microvm"], short=["microvm"]))
def test_other_machines(machine: str, disk: Path) -> None:
    setup = GuestSetup(machine=machine, ram=64 << 20, working_set=16 << 20)
    with start(setup, disk) as guest:
        save_live(guest, disk / "snapshot")
    assert_saved(disk / "snapshot", setup, "instant")


@pytest.mark.long
@pytest.mark.parametrize("memory", MEMORY_KINDS)
@pytest.mark.parametrize("rate", [None, 50e6])
def test_many_saves_are_each_of_one_instant(memory: str, rate: float | None, disk: Path) -> None:
    setup = GuestSetup(ram=256 << 20, working_set=96 << 20, filled=100 << 20)
    with start(setup, disk, memory=memory, rate=rate) as guest:
        for sparse in ("auto", "exact", "dense", "auto"):
            save_live(guest, disk / "snapshot", sparse=sparse, seal="xxh3-128", channels=4)
            assert_saved(disk / "snapshot", setup, "instant")
            check = verify_seal(disk / "snapshot")
            assert check is not None and check.intact


@pytest.mark.parametrize("sparse", covering(["auto", "exact"], short=["exact"]))
def test_seal_and_digests_are_those_of_the_file(sparse: str, disk: Path) -> None:
    path = disk / "snapshot"
    with start(SMALL, disk) as guest:
        save_live(guest, path, keep_digests=True, seal="xxh3-128", sparse=sparse)
    check = verify_seal(path)
    assert check is not None and check.intact
    with open_snapshot(path) as snapshot, path.open("rb") as file:
        specs = [BlockSpec(b.name, b.length, b.page_size) for b in snapshot.layouts]
        table = read_page_table(page_table_path(path), specs)
        assert table is not None
        assert table.snapshot.differs_from(identify_snapshot(path, file.fileno())) is None
        assert table.snapshot.seal is not None
        blocks = [RamBlock(b.name, b.memory()) for b in snapshot.blocks.values()]
        with PageDigests(blocks, table.tables) as digests:
            changed = {name: Bitmap(t.npages) for name, t in digests.tables.items()}
            assert digests.start_compare(changed).wait().changed_pages == 0


def test_device_that_is_plugged_during_the_save_fails_it(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rom = tmp_path / "option.rom"
    rom.write_bytes(b"\x55\xaa" + bytes(2046))
    original = precopy._Precopy._write_live
    with start(replace(SMALL, machine="pc"), disk) as guest:

        def plug(self: precopy._Precopy) -> None:
            original(self)
            guest.execute("device_add", driver="e1000", id="net1", romfile=str(rom))

        monkeypatch.setattr(precopy._Precopy, "_write_live", plug)
        found = AsFound(guest, disk)
        with pytest.raises(QemuError, match=r"e1000.rom' was added, removed or resized"):
            save_live(guest, disk / "snapshot")
        found.check()


def test_digests_are_not_written_over_another_file(disk: Path) -> None:
    page_table_path(disk / "snapshot").write_bytes(b"mine")
    with source(disk) as guest:
        with pytest.raises(UsageError):
            save_live(guest, disk / "snapshot", keep_digests=True)
        guest.assert_as_before()
    assert not (disk / "snapshot").exists()


def test_guest_that_does_not_run_is_saved_with_digests(disk: Path) -> None:
    with source(disk, run=False) as guest:
        report = save_live(guest, disk / "snapshot", keep_digests=True)
        assert (report.method, report.downtime) == ("precopy", None)
        guest.files |= {"snapshot", "snapshot.pages"}
        guest.assert_as_before()
    assert page_table_path(disk / "snapshot").exists()


# ---- without being asked --------------------------------------------------------------------


def test_large_guest_is_saved_so_without_being_asked(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_precopy, "LARGE_GUEST", 32 << 20)
    with start(SMALL, disk) as guest:
        for then, method in [(None, "precopy"), ("pause", None)]:
            report = save_live(guest, disk / "snapshot", live=False, then=then)
            assert report.method == method
            assert_saved(disk / "snapshot", SMALL)


def test_device_state_that_qemu_refuses_is_noticed_before_memory_is_copied(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no such device here, so the refusal is made up; engine qemu takes over."""
    monkeypatch.setattr(live_precopy, "LARGE_GUEST", 32 << 20)
    states: list[bool] = []

    async def refuse(transaction: SaveTransaction, guest: GuestInfo, path: str) -> None:
        states.append((await transaction.monitor.execute("query-status"))["running"])
        raise DeviceStateRefused("xen-save-devices-state", "no")

    def copy(self: precopy._Precopy) -> None:
        raise AssertionError("memory was copied")

    monkeypatch.setattr(device_state, "save_device_sections", refuse)
    monkeypatch.setattr(precopy._Precopy, "_write_live", copy)
    with start(SMALL, disk, memory="private") as guest:
        report = sync.connect(guest.socket).save(disk / "snapshot")
        guest.wait_for_writes(100)
    assert states == [True]
    assert (report.engine, report.method) == ("qemu", None)
    assert "no" in report.why


def test_asking_for_the_device_state_lets_the_guest_go_on(disk: Path) -> None:
    async def ask(path: Path) -> tuple[list[str], int]:
        async with await Monitor.connect(path) as monitor:
            with await inspect(monitor) as found:
                transaction = SaveTransaction(monitor, found, str(disk / "snapshot"))
                async with transaction:
                    way = DeviceStateMethod.DEVICES_ONLY
                    await device_state.try_device_state(transaction, found, way)
                    status = await monitor.execute("query-status")
                return [status["status"]], len(await monitor.execute("query-fdsets"))

    with start(SMALL, disk, memory="private") as guest:
        guest.wait_for_writes(100)
        assert asyncio.run(ask(guest.socket)) == (["running"], 0)
        guest.wait_for_writes(100)


def test_small_guest_is_saved_while_it_is_stopped(disk: Path) -> None:
    with start(SMALL, disk) as guest:
        report = save_live(guest, disk / "snapshot", live=False)
    assert (report.method, report.instant) == (None, "start")


def test_large_guest_whose_file_was_begun_wrongly_is_stopped_for_its_save(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_precopy, "LARGE_GUEST", 32 << 20)
    monkeypatch.setattr(precopy, "_uuid", lambda guest: bytes(16))
    with start(SMALL, disk) as guest:
        report = save_live(guest, disk / "snapshot", live=False)
        assert report.method is None
        assert any("stopped for the whole save" in note for note in report.notes)
    assert_saved(disk / "snapshot", SMALL)


def test_large_guest_is_stopped_where_memory_is_scarce(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_precopy, "LARGE_GUEST", 32 << 20)
    monkeypatch.setattr(precopy, "available_memory", lambda: 1 << 20)
    with start(SMALL, disk) as guest:
        report = save_live(guest, disk / "snapshot", live=False)
        assert report.method is None
        assert any("the host has only 1 MiB available" in note for note in report.notes)
    assert_saved(disk / "snapshot", SMALL)


# ---- the promise ----------------------------------------------------------------------------


def test_pause_that_is_foreseen_to_be_too_long_is_not_begun(disk: Path) -> None:
    with start(SMALL, disk) as guest:
        with GapRecorder(guest), pytest.raises(LiveSaveAbandoned, match="would pause"):
            save_as_promised(guest, disk / "snapshot", 0.005)
        guest.wait_for_writes()
    assert not (disk / "snapshot").exists()


def test_guest_goes_on_when_the_promised_pause_is_over(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PageCopies.copy

    def slow(copies: PageCopies, channels: Any, room: int) -> bool:
        while not channels.cancelled:
            time.sleep(0.001)
        return original(copies, channels, room)

    monkeypatch.setattr(precopy._Precopy, "_check_expected_pause", lambda self: None)
    monkeypatch.setattr(precopy, "_WORTH_A_ROUND", 1 << 62)
    monkeypatch.setattr(PageCopies, "copy", slow)
    with start(SMALL, disk) as guest:
        with GapRecorder(guest) as gaps, pytest.raises(LiveSaveAbandoned, match="let go"):
            save_as_promised(guest, disk / "snapshot", 0.2)
        assert gaps.longest.seconds < 0.6
        guest.wait_for_writes()
    assert not (disk / "snapshot").exists()


def save_as_promised(guest: WritingGuest, path: Path, pause: float) -> None:
    """Save, although the choice of methods does not expect the promise to be kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_precopy, "_SECONDS", 0.0)
        patch.setattr(live_precopy, "_compare_seconds", lambda guest: 0.0)
        save_live(guest, path, max_pause=pause)


@pytest.mark.parametrize("room", covering([0, 1 << 20], short=[1 << 20]))
def test_changed_pages_beyond_the_available_memory_are_written_in_the_pause(
    room: int, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precopy, "_room", lambda: room)
    with start(SMALL, disk) as guest:
        save_live(guest, disk / "snapshot", seal="xxh3-128")
    check = verify_seal(disk / "snapshot")
    assert check is not None and check.intact
    assert_saved(disk / "snapshot", SMALL, "instant")


# ---- failures -------------------------------------------------------------------------------


@pytest.fixture(params=["file", "private"])
def guest(request: pytest.FixtureRequest, disk: Path) -> Iterator[Source]:
    """Its device state is written by ``migrate``, or by ``xen-save-devices-state``."""
    with source(disk, memory=request.param, length=64 << 20) as guest:
        yield guest


def in_the_pause(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    original = precopy._Precopy._copy_changed

    async def meddled(self: Any, stopped_at: float) -> None:
        action()
        await original(self, stopped_at)

    monkeypatch.setattr(precopy._Precopy, "_copy_changed", meddled)


def after_the_pause(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    original = precopy._Precopy._finish

    def meddled(self: Any, state: Any) -> Any:
        action()
        return original(self, state)

    monkeypatch.setattr(precopy._Precopy, "_finish", meddled)


def test_it_is_saved_and_left_as_it_was(guest: Source, disk: Path) -> None:
    save_live(guest, disk / "snapshot")
    guest.files.add("snapshot")
    guest.assert_as_before()


def test_second_client_that_resumes_the_guest_ends_the_save(
    guest: Source, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_pause(monkeypatch, lambda: guest.vm.execute("cont"))
    with pytest.raises(QemuError, match="another client resumed"):
        save_live(guest, disk / "snapshot")
    guest.assert_as_before()


def test_error_in_the_pause_leaves_the_guest_as_it_was(
    guest: Source, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise NoSpace("a full disk", "snapshot")

    for place in (in_the_pause, after_the_pause):
        with monkeypatch.context() as patch:
            place(patch, fail)
            with pytest.raises(NoSpace):
                save_live(guest, disk / "snapshot")
        guest.assert_as_before()


def test_memory_that_cannot_be_read_in_the_pause(
    guest: Source, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> bool:
        raise GuestMemoryError(14, "guest memory went away", block="pc.ram")

    monkeypatch.setattr(PageCopies, "copy", gone)
    monkeypatch.setattr(precopy, "_WORTH_A_ROUND", 1 << 62)
    with pytest.raises(GuestMemoryError):
        save_live(guest, disk / "snapshot")
    guest.assert_as_before()


@pytest.mark.parametrize("place", [in_the_pause, after_the_pause])
def test_qemu_that_is_killed_leaves_no_file(
    place: Any, guest: Source, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        guest.vm.process.kill()
        guest.vm.process.wait()

    place(monkeypatch, kill)
    with pytest.raises((QemuGone, GuestMemoryError)):
        save_live(guest, disk / "snapshot")
    assert not (disk / "snapshot").exists()
    assert guest._guardians() == []


def test_full_disk_while_the_guest_runs(
    guest: Source, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise NoSpace("no space", "snapshot")

    monkeypatch.setattr(OutputFile, "write_at", full)
    with pytest.raises(NoSpace):
        save_live(guest, disk / "snapshot")
    guest.assert_as_before()


def test_cancelled_save_leaves_the_guest_as_it_was(guest: Source, disk: Path) -> None:
    async def cancelled(after: float) -> bool:
        task = asyncio.ensure_future(save(guest.socket, disk / "snapshot", **METHOD))
        await asyncio.sleep(after)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return True
        return False

    outcomes = []
    for after in (0.05, 0.3):
        outcomes.append(asyncio.run(cancelled(after)))
        if not outcomes[-1]:
            guest.files.add("snapshot")
        guest.assert_as_before()
    assert any(outcomes)


def test_disks_are_those_of_the_pause(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = disk / "image.raw"
    image.write_bytes(bytes(1 << 20))
    states: list[Any] = []
    original = SaveTransaction.take_disks

    async def look(transaction: SaveTransaction) -> None:
        states.append(await transaction.monitor.execute("query-status"))
        await original(transaction)

    monkeypatch.setattr(SaveTransaction, "take_disks", look)
    drive = f"driver=raw,file.driver=file,file.filename={image},node-name=drive"
    extra = ["-blockdev", drive, "-device", "virtio-blk-pci,drive=drive"]
    with start(SMALL, disk, extra=extra) as guest:
        save_live(guest, disk / "snapshot", with_disks=True)
        guest.wait_for_writes()
    assert [state["running"] for state in states] == [False]
    assert_saved(disk / "snapshot", SMALL)


def assert_old_or_whole(path: Path) -> None:
    """The name shows what it showed, or a whole snapshot; then it shows the old content again."""
    with path.open("rb") as file:
        if file.read(len(OLD)) == OLD:
            return
    with open_snapshot(path) as snapshot:
        snapshot.verify()
    path.write_bytes(OLD)


@pytest.mark.parametrize(
    ("memory", "kills"),
    covering([("private", 1), ("private", 50), ("file", 50)], short=[("private", 1)]),
)
def test_guest_survives_that_the_saver_is_killed(memory: str, kills: int, disk: Path) -> None:
    choose, whole, killed = random.Random(kills), 4.0, 0
    with source(disk, memory=memory, length=64 << 20) as guest:
        path = disk / "snapshot"
        path.write_bytes(OLD)
        guest.files.add("snapshot")
        for _ in range(4 * kills):
            started_at = time.monotonic()
            process = guest.start_save(path, "--live", "--method", "precopy")
            try:
                process.wait(choose.uniform(whole / 6, whole))
                whole = min(whole, time.monotonic() - started_at)
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
            process.communicate(timeout=60)
            guest.assert_as_before(within=30)
            assert_old_or_whole(path)
            if killed == kills:
                return
    raise AssertionError(f"{killed} kills came in time: the test proves little")
