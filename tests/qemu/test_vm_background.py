"""``vm save --live --method background``: one instant, the start of the save; the guest as found."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import convert, open_snapshot, seal, verify_seal
from pyqmigrate.errors import Cancelled, NotSupported, PyqmigrateError
from pyqmigrate.snapshot.provenance import provenance
from pyqmigrate.vm import sync
from pyqmigrate.vm.guest import processor_time
from pyqmigrate.vm.outgoing.save import save
from pyqmigrate.vm.plan import live
from pyqmigrate.vm.plan.live_option import LiveMethod, LiveOption
from tests.harness.covering import covering
from tests.harness.gaps import GapRecorder
from tests.harness.killed_saves import assert_old_or_whole, save_on, wait_for_touch
from tests.harness.saving import Source, source, wait_until
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
LARGE = 128 << 20
METHOD: dict[str, Any] = {"live": "background"}
KINDS = [("q35", "memfd"), ("pc", "private"), ("microvm", "tmpfs"), ("q35", "hugetlb")]


def settings(guest: WritingGuest) -> Any:
    return (
        guest.execute("query-migrate-capabilities"),
        guest.execute("query-migrate-parameters"),
        guest.execute("query-fdsets"),
        guest.execute("query-status")["status"],
    )


def assert_between(instant: Instant, before: Instant, after: Instant) -> None:
    """Torn pages aside, which ``before`` and ``after`` do not show."""
    assert before <= Instant(instant.generation, instant.written) <= after


@pytest.mark.parametrize(
    ("machine", "memory"),
    covering(KINDS, short=[("pc", "private"), ("microvm", "tmpfs"), ("q35", "hugetlb")]),
)
def test_file_holds_one_instant_of_the_start(machine: str, memory: str, disk: Path) -> None:
    setup = GuestSetup(machine, working_set=16 * MIB, filled=16 * MIB)
    path = disk / "snapshot"
    with start(setup, disk, memory=memory) as guest:
        found = settings(guest)
        before = guest.position()
        report = sync.connect(guest.socket).save(path, **METHOD)
        after = guest.position()
        assert settings(guest) == found
        guest.wait_for_writes(100)
        assert (report.method, report.instant) == (LiveMethod.BACKGROUND, "start")
        assert report.downtime is not None and report.run_state_after == "running"
        assert_between(check_snapshot(path, setup), before, after)
    with open_snapshot(path) as snapshot:
        snapshot.verify()
        assert not snapshot.stream.background
        assert 0 < snapshot.blocks[setup.block].data_pages < snapshot.blocks[setup.block].num_pages
        assert provenance(snapshot).run_state == "running"
    for mode in ("instant", "load"):
        with restore(setup, path, disk, mode=mode) as guest:
            guest.wait_for_writes()
            guest.assert_memory_held()


def test_report_has_the_slowdown_of_a_guest_that_writes(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor_time, "_LEAST_BUSY", 1e-6)  # however busy the host is
    setup = GuestSetup(working_set=16 * MIB, filled=4 * MIB)
    with start(setup, disk) as guest:
        guest.wait_for_writes(100)
        report = sync.connect(guest.socket).save(disk / "snapshot", **METHOD)
    assert report.slowdown is not None and 0 <= report.slowdown <= 1


@pytest.mark.long
@pytest.mark.parametrize(("machine", "memory"), KINDS)
def test_series_of_background_snapshots(machine: str, memory: str, disk: Path) -> None:
    setup = GuestSetup(machine, ram=256 * MIB, working_set=32 * MIB, filled=64 * MIB)
    path = disk / "snapshot"
    with start(setup, disk, memory=memory) as guest:
        found = settings(guest)
        for number in range(6):
            with GapRecorder(guest):
                before = guest.position()
                sync.connect(guest.socket).save(path, with_disks=number % 2 == 1, **METHOD)
            assert_between(check_snapshot(path, setup), before, guest.position())
            assert settings(guest) == found
            with restore(setup, path, disk, mode=("instant", "load")[number % 2]) as restored:
                restored.wait_for_writes()
                restored.assert_memory_held()


def test_disks_are_taken_at_the_start(disk: Path) -> None:
    setup = GuestSetup(working_set=16 * MIB)
    path, image = disk / "snapshot", disk / "disk.raw"
    image.write_bytes(b"")
    os.truncate(image, 64 * MIB)
    drive = ["-drive", f"file={image},format=raw,if=virtio,id=d0"]
    with start(setup, disk, extra=drive) as guest:
        before = guest.position()
        report = sync.connect(guest.socket).save(path, with_disks=True, **METHOD)
        assert_between(check_snapshot(path, setup), before, guest.position())
        [device] = guest.execute("query-block")
        assert device["inserted"]["file"].endswith(".qcow2")
        assert device["inserted"]["backing_file"] == str(image)
        assert guest.execute("query-status")["running"]
        guest.wait_for_writes(100)
        assert report.record is not None
    with open_snapshot(path) as snapshot:
        assert provenance(snapshot).run_state == "running"
    for mode in ("instant", "load"):
        with restore(
            setup, path, disk, mode=mode, extra=drive, disks_as_they_are=True, paused=False
        ) as guest:
            guest.wait_for_writes()
            guest.assert_memory_held()


def test_sealed_background_snapshot_verifies(disk: Path) -> None:
    with source(disk) as guest:
        guest.save(disk / "snapshot", seal="xxh3-128", **METHOD)
        assert verify_seal(disk / "snapshot").intact


def test_memory_that_is_a_file_on_a_disk_is_refused(disk: Path) -> None:
    """It is an instantly restored guest's; QEMU gives the reason if it is asked all the same."""
    setup = GuestSetup(working_set=8 * MIB)
    with start(setup, disk, memory="instant") as guest:
        found = settings(guest)
        with pytest.raises(NotSupported, match="write-protect"):
            sync.connect(guest.socket).save(disk / "snapshot", **METHOD)
        assert settings(guest) == found


def test_refusal_of_qemu_is_explained(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    option = LiveOption(LiveMethod.BACKGROUND, (), 0.01, "")
    monkeypatch.setattr(live, "_option", lambda _: lambda *_: option)
    setup = GuestSetup(working_set=8 * MIB)
    with start(setup, disk, memory="instant") as guest:
        found = settings(guest)
        with pytest.raises(NotSupported, match=r"memory configuration.*a file on a disk"):
            sync.connect(guest.socket).save(disk / "snapshot", **METHOD)
        assert settings(guest) == found
        assert not (disk / "snapshot").exists()


@pytest.mark.parametrize("then", covering(["pause", "quit"], short=["pause"]))
def test_guest_that_is_to_stop_afterwards_is_refused(then: str, disk: Path) -> None:
    with source(disk) as guest:
        with pytest.raises(NotSupported, match="runs before and after"):
            guest.save(disk / "snapshot", then=then, **METHOD)
        guest.assert_as_before()


def test_running_guest_survives_a_full_disk(disk: Path) -> None:
    with source(disk) as guest:
        code, errors, left = save_on(
            guest, "tmpfs -o size=8m", "--method", "background", blind=True
        )
        assert (code, left) == (3, []), errors
        assert "No space left" in errors
        guest.assert_as_before()


@pytest.mark.parametrize("with_disks", covering([False, True], short=[True]))
def test_cancelled_save_leaves_the_guest_as_it_was(with_disks: bool, disk: Path) -> None:
    async def cancelled(guest: Source, after: float) -> bool:
        work = save(guest.socket, disk / "snapshot", with_disks=with_disks, **METHOD)
        task = asyncio.ensure_future(work)
        await asyncio.sleep(after)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return True
        return False

    image = disk / "disk.raw"
    image.write_bytes(b"")
    os.truncate(image, 64 * MIB)
    drive = ("-drive", f"file={image},format=raw,if=virtio,id=d0") if with_disks else ()
    with source(disk, length=LARGE, extra=drive) as guest:
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
    covering([("memfd", 1), ("memfd", 25), ("private", 25)], short=[("memfd", 1)]),
)
@pytest.mark.timeout(900)
def test_guest_survives_that_the_command_is_killed(memory: str, kills: int, disk: Path) -> None:
    rng = random.Random(kills)
    with source(disk, memory=memory, length=LARGE) as guest:
        (disk / "snapshot").write_bytes(b"what was there before")
        guest.files.add("snapshot")
        for _ in range(kills):
            process = guest.start_save(disk / "snapshot", "--method", "background")
            wait_for_touch(guest)
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            guest.assert_as_before(within=30)
            assert_old_or_whole(disk / "snapshot")


def test_other_client_that_cancels_the_migration_ends_the_save(disk: Path) -> None:
    with source(disk, length=LARGE) as guest:
        guest.ram.memory[LARGE // 2 :] = b"x" * (LARGE // 2)

        async def cancelled() -> None:
            task = asyncio.ensure_future(save(guest.socket, disk / "snapshot", **METHOD))
            status = "none"
            while status != "active" and not task.done():
                await asyncio.sleep(0.001)
                status = guest.vm.execute("query-migrate").get("status")
            guest.vm.execute("migrate_cancel")
            await task

        with pytest.raises(Cancelled):
            asyncio.run(cancelled())
        guest.assert_as_before()


def test_qemu_that_is_killed_leaves_no_file(disk: Path) -> None:
    with source(disk, length=LARGE) as guest:
        process = guest.start_save(disk / "snapshot", "--method", "background")
        wait_for_touch(guest)
        guest.vm.process.kill()
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0 and b"QEMU" in errors
        wait_until(lambda: guest._guardians() == [], "a guardian is left")
        assert not (disk / "snapshot").exists()


def test_pause_by_another_client_is_kept(disk: Path) -> None:
    """Once QEMU has resumed the guest, it belongs to its owner again."""
    with source(disk, length=LARGE) as guest:
        guest.ram.memory[LARGE // 2 :] = b"x" * (LARGE // 2)

        async def paused() -> None:
            task = asyncio.ensure_future(save(guest.socket, disk / "snapshot", **METHOD))
            written = 0
            while not written and not task.done():
                await asyncio.sleep(0.001)
                written = guest.vm.execute("query-migrate").get("ram", {}).get("normal", 0)
            guest.vm.execute("stop")
            await task

        asyncio.run(paused())
        assert guest.status() == "paused"


def raw_snapshot(guest: WritingGuest, path: Path, uri: str, *capabilities: str) -> None:
    """Have QEMU alone write a background snapshot."""
    states = [{"capability": n, "state": True} for n in ("background-snapshot", *capabilities)]
    guest.execute("migrate-set-capabilities", capabilities=states)
    guest.execute("migrate-set-parameters", max_bandwidth=0)
    guest.execute("migrate", uri=uri)
    guest._wait(lambda: guest.execute("query-migrate")["status"] not in ("setup", "active"), 60)
    assert guest.execute("query-migrate")["status"] == "completed"


@pytest.mark.parametrize("to", covering(["file", "exec"], short=["file"]))
def test_sequential_background_snapshot_is_read_converted_and_restored(to: str, disk: Path) -> None:
    setup = GuestSetup(working_set=16 * MIB, filled=4 * MIB)
    raw, path = disk / "raw", disk / "snapshot"
    with start(setup, disk) as guest:
        before = guest.position()
        raw_snapshot(guest, raw, {"file": f"file:{raw}", "exec": f"exec:cat > {raw}"}[to])
        after = guest.position()
    with open_snapshot(raw) as snapshot:
        snapshot.verify()
        stream = snapshot.stream
        assert stream.background and stream.complete and not stream.opaque_tail
        found = provenance(snapshot)
        assert found.loadable and any("background" in text for text in found.remarks)
    assert_between(check_snapshot(raw, setup), before, after)
    seal(raw)
    assert verify_seal(raw).intact
    convert(raw, path, to="mapped-ram")
    again = disk / "again"
    convert(raw, again, to="stream")
    with open_snapshot(again) as snapshot:
        assert not snapshot.stream.background
    assert check_snapshot(path, setup) == check_snapshot(again, setup) == check_snapshot(raw, setup)
    for mode in ("instant", "load"):
        with restore(setup, path, disk, mode=mode) as guest:
            guest.wait_for_writes()
            guest.assert_memory_held()


def test_background_snapshot_is_converted_as_it_comes_from_a_socket(disk: Path) -> None:
    setup = GuestSetup(working_set=16 * MIB, filled=4 * MIB)
    fifo, path = disk / "fifo", disk / "snapshot"
    os.mkfifo(fifo)
    with start(setup, disk) as guest:
        before = guest.position()

        async def both() -> None:
            writing = asyncio.to_thread(raw_snapshot, guest, path, f"exec:cat > {fifo}")
            reading = asyncio.to_thread(convert, fifo, path, to="mapped-ram")
            await asyncio.gather(writing, reading)

        asyncio.run(both())
        assert_between(check_snapshot(path, setup), before, guest.position())


def test_mapped_ram_background_snapshot_of_qemu_alone_is_read_and_completed(disk: Path) -> None:
    """QEMU leaves its bitmaps empty, and would load it as zeros."""
    setup = GuestSetup(working_set=16 * MIB, filled=4 * MIB)
    raw, path = disk / "raw", disk / "snapshot"
    with start(setup, disk) as guest:
        before = guest.position()
        raw_snapshot(guest, raw, f"file:{raw}", "mapped-ram")
        assert_between(check_snapshot(raw, setup), before, guest.position())
    with open_snapshot(raw) as snapshot:
        snapshot.verify()
        assert snapshot.stream.background
        [obstacle] = provenance(snapshot).obstacles
        assert "convert it to mapped-ram" in obstacle
    for refused in (lambda: restore(setup, raw, disk).__enter__(), lambda: seal(raw)):
        with pytest.raises(NotSupported, match="convert it to mapped-ram"):
            refused()
    convert(raw, path, to="mapped-ram")
    with open_snapshot(path) as snapshot, open_snapshot(raw) as source_snapshot:
        assert not snapshot.stream.background
        counts = [block.data_pages for block in source_snapshot.blocks.values()]
        assert [block.data_pages for block in snapshot.blocks.values()] <= counts
    with restore(setup, path, disk, mode="load") as guest:
        guest.wait_for_writes()
        guest.assert_memory_held()


def test_mapped_ram_background_snapshot_without_its_end_is_refused(disk: Path) -> None:
    setup = GuestSetup(working_set=8 * MIB)
    raw = disk / "raw"
    with start(setup, disk) as guest:
        raw_snapshot(guest, raw, f"file:{raw}", "mapped-ram")
    os.truncate(raw, raw.stat().st_size - 20000)
    with pytest.raises(PyqmigrateError, match=r"did not finish|cut short|missing"):
        open_snapshot(raw).close()
