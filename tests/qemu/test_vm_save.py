"""A running QEMU is saved by each engine; a stock QEMU loads the file, and the guest goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import open_snapshot
from pyqmigrate.errors import QemuError, UsageError
from pyqmigrate.io.job import Progress
from pyqmigrate.vm.outgoing.save import _Save, save
from pyqmigrate.vm.record.contents import read_record
from tests.harness.covering import covering
from tests.harness.machine import RAM_BLOCK
from tests.harness.pattern_guest import check_pattern
from tests.harness.saving import KINDS, loaded, source, wait_until

pytestmark = pytest.mark.qemu

ENGINES = ["qemu", "direct"]
# Each machine with one kind of memory; on pc each kind with one engine.
MATRIX = covering(
    ((engine, machine, memory) for engine in ENGINES for machine in RAM_BLOCK for memory in KINDS),
    short=[
        ("direct", "q35", "file"),
        ("qemu", "microvm", "private"),
        *((ENGINES[number % 2], "pc", memory) for number, memory in enumerate(KINDS)),
    ],
)
# Engine, kind of memory, and whether it runs.
DISKS = [
    (engine, memory, run)
    for engine in ENGINES
    for memory in ("file", "private")
    for run in (True, False)
]


@pytest.mark.parametrize(("engine", "machine", "memory"), MATRIX)
def test_running_guest_is_saved_and_goes_on(
    engine: str, machine: str, memory: str, disk: Path
) -> None:
    path = disk / "snapshot"
    with source(disk, machine=machine, memory=memory) as guest:
        report = guest.save(path, engine=engine)
        assert (report.engine, report.run_state_after) == (engine, "running")
        assert report.downtime is not None and report.downtime < report.seconds + 0.2
        guest.files.add("snapshot")
        guest.assert_as_before()
        counted = guest.serial.read_bytes()
        with loaded(guest, path) as other:
            assert other.status() == "paused"  # it was started with -S
            ram = bytes(other.ram.memory[:])
            instant = check_pattern(ram)
            other.vm.execute("cont")
            other.wait_for_count(2)
            assert other.serial.read_bytes()[0] in (
                instant.generation & 0x7F,
                instant.generation + 1 & 0x7F,
            )
    assert instant.generation - 1 <= len(counted)


@pytest.mark.parametrize(("engine", "machine", "memory"), MATRIX)
def test_paused_guest_is_saved_as_it_is(engine: str, machine: str, memory: str, disk: Path) -> None:
    path = disk / "snapshot"
    with source(disk, machine=machine, memory=memory, run=False) as guest:
        report = guest.save(path, engine=engine)
        # QEMU cannot go back to paused from a migration of its own.
        assert guest.status() == ("paused" if engine == "direct" else "postmigrate")
        assert report.downtime is None
        assert bool(report.notes) == (engine == "qemu")
        guest.run_state = guest.status()
        guest.files.add("snapshot")
        guest.assert_as_before()
        memory_now = guest.vm.read_blocks()
        with loaded(guest, path) as other:
            assert other.status() == "paused"
            assert other.vm.read_blocks() == memory_now


def test_auto_leaves_a_paused_guest_paused(disk: Path) -> None:
    with source(disk, memory="private", run=False) as guest:
        report = guest.save(disk / "snapshot")
        assert (report.engine, guest.status()) == ("direct", "paused")


@pytest.mark.parametrize(
    ("memory", "how"),
    [
        ("file", {"engine": "qemu"}),
        ("file", {"live": "converge"}),
        ("file", {"engine": "direct"}),
        ("private", {"engine": "direct"}),
    ],
    ids=["qemu", "live", "ignore-shared", "devices-only"],
)
def test_downtime_is_what_another_client_sees(memory: str, how: dict[str, Any], disk: Path) -> None:
    with source(disk, memory=memory) as guest:
        report = guest.save(disk / "snapshot", **how)
        guest.status()  # all events up to now have been read
        times = {
            event["event"]: event["timestamp"]["seconds"] * 10**6
            + event["timestamp"]["microseconds"]
            for event in guest.vm.qmp.events
        }
    assert report.downtime is not None
    seen = times["RESUME"] - times["STOP"]
    assert 0 < seen <= round(report.downtime * 10**6) <= seen + 10**6


def test_end_of_a_migration_is_reported_without_being_asked_for(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions alone would take a minute each here."""
    monkeypatch.setattr("pyqmigrate.vm.outgoing.migrate._FIRST_POLL", 60.0)
    monkeypatch.setattr("pyqmigrate.vm.outgoing.migrate._LAST_POLL", 60.0)
    with source(disk) as guest:
        events = [{"capability": "events", "state": False}]
        guest.vm.execute("migrate-set-capabilities", {"capabilities": events})
        guest.before = guest.settings()
        report = guest.save(disk / "snapshot", engine="qemu")
        assert report.seconds < 60
        guest.files.add("snapshot")
        guest.assert_as_before()


def test_live_save_is_of_the_engine_that_was_requested(disk: Path) -> None:
    with source(disk) as guest:
        guest.files.add("snapshot")
        for engine, methods in (("direct", {"precopy"}), ("qemu", {"converge", "background"})):
            report = guest.save(disk / "snapshot", engine=engine, live=True)
            assert report.engine == engine and str(report.method) in methods
            guest.assert_as_before()
            with open_snapshot(disk / "snapshot") as snapshot:
                block = snapshot.blocks["pc.ram"]
                check_pattern(block.read(0, block.length))


@pytest.mark.parametrize("engine", ENGINES)
def test_then_pause_leaves_the_guest_standing(engine: str, disk: Path) -> None:
    with source(disk) as guest:
        report = guest.save(disk / "snapshot", engine=engine, then="pause")
        assert report.run_state_after == guest.status() == "postmigrate"
        assert report.downtime is None
        assert guest.settings() == guest.before
        with open_snapshot(disk / "snapshot") as snapshot:
            ram = snapshot.blocks["pc.ram"]
            assert ram.read(0, ram.length) == guest.ram.memory[:]


@pytest.mark.parametrize("engine", ENGINES)
def test_then_quit_ends_qemu_after_the_snapshot_has_its_name(engine: str, disk: Path) -> None:
    with source(disk) as guest:
        report = guest.save(disk / "snapshot", engine=engine, then="quit")
        assert report.run_state_after is None and report.notes == ()
        assert guest.vm.process.poll() == 0
        with open_snapshot(disk / "snapshot") as snapshot:
            snapshot.verify()
            ram = snapshot.blocks["pc.ram"]
            check_pattern(ram.read(0, ram.length))


def test_qemu_that_does_not_quit_is_reported(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyqmigrate.vm.outgoing.save._QUIT_TIMEOUT", 0.5)
    monkeypatch.setattr("pyqmigrate.vm.outgoing.save._Save._end", held_up(_Save._end))
    with source(disk) as guest:
        report = guest.save(disk / "snapshot", then="quit")
        guest.vm.process.send_signal(signal.SIGCONT)
        assert any("has not ended" in note for note in report.notes)


def held_up(end: Callable[..., Any]) -> Callable[..., Any]:
    """QEMU stands still and cannot quit."""

    async def later(save: _Save) -> Any:
        assert save.guest.pid is not None
        execute = save.monitor.execute

        async def unheard(command: str) -> None:
            assert save.guest.pid is not None
            os.kill(save.guest.pid, signal.SIGSTOP)

        save.monitor.execute = unheard  # type: ignore[method-assign,assignment]
        try:
            return await end(save)
        finally:
            save.monitor.execute = execute  # type: ignore[method-assign]

    return later


@pytest.mark.parametrize("engine", ENGINES)
def test_then_resume_starts_a_paused_guest(engine: str, disk: Path) -> None:
    with source(disk, run=False) as guest:
        guest.save(disk / "snapshot", engine=engine, then="resume")
        assert guest.status() == "running"
        guest.wait_for_count(guest.count() + 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_older_snapshot_is_replaced(engine: str, disk: Path) -> None:
    (disk / "snapshot").write_bytes(b"old")
    with source(disk) as guest:
        guest.save(disk / "snapshot", engine=engine)
        guest.assert_as_before()
        with open_snapshot(disk / "snapshot") as snapshot:
            snapshot.verify()


def test_settings_that_are_in_the_way_are_put_aside_and_restored(disk: Path) -> None:
    with source(disk, memory="private") as guest:
        guest.vm.set_capabilities({"xbzrle": True, "release-ram": True, "x-ignore-shared": True})
        guest.vm.execute(
            "migrate-set-parameters",
            {"multifd-compression": "zlib", "max-bandwidth": 4096, "multifd-channels": 7},
        )
        guest.before = guest.settings()
        report = guest.save(disk / "snapshot", engine="qemu", channels=3)
        assert report.settings["release-ram"].value is False
        assert report.settings["multifd-channels"].value == 3
        guest.files.add("snapshot")
        guest.assert_as_before()


def test_direct_io_off_is_heeded_by_both_engines(disk: Path) -> None:
    with source(disk) as guest:
        for engine in ENGINES:
            report = guest.save(disk / "snapshot", engine=engine, direct_io="off")
            assert (report.direct_io, report.direct_io_reason) == (False, "switched off")


@pytest.mark.parametrize("engine", ENGINES)
def test_progress_ends_at_the_whole(engine: str, disk: Path) -> None:
    seen = []
    with source(disk) as guest:
        guest.save(disk / "snapshot", engine=engine, progress=seen.append)
    assert seen[-1].bytes_done == seen[-1].bytes_total >= guest.ram.length


def test_place_within_a_file_is_refused(disk: Path) -> None:
    with source(disk) as guest:
        with pytest.raises(UsageError, match="offset"):
            guest.save(Path(f"file:{disk}/snapshot,offset=4096"))
        guest.assert_as_before()


def test_monitor_that_no_process_listens_at_is_an_error(disk: Path) -> None:
    with pytest.raises(QemuError, match="connect"):
        asyncio.run(save(disk / "no.qmp", disk / "snapshot"))
    assert list(disk.iterdir()) == []


def test_command_saves_and_reports(disk: Path) -> None:
    with source(disk) as guest:
        process = guest.start_save(disk / "snapshot", "--json")
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        guest.files.add("snapshot")
        guest.assert_as_before()
        told = json.loads(output)
        assert told["engine"] == "direct" and told["run_state_after"] == "running"
        assert told["file_size"] == (disk / "snapshot").stat().st_size
        wait_until(lambda: guest.vm.process.poll() is None, "QEMU ended")


def test_command_lists_the_changed_settings(disk: Path) -> None:
    with source(disk) as guest:
        process = guest.start_save(disk / "snapshot", "--engine", "qemu")
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        text = output.decode()
        assert "setting   multifd=on during the save" in text
        assert "running before, running now" in text


def with_disk(directory: Path) -> tuple[str, ...]:
    (directory / "image").write_bytes(bytes(1 << 20))
    return ("-drive", f"file={directory}/image,format=raw,if=virtio")


@pytest.mark.parametrize(
    ("engine", "memory", "run"),
    covering(
        DISKS,
        short=[
            ("qemu", "file", True),
            ("direct", "file", False),
            ("direct", "private", True),
            ("qemu", "private", False),
        ],
    ),
)
def test_disks_are_taken_along(engine: str, memory: str, run: bool, disk: Path) -> None:
    with source(disk, memory=memory, run=run, extra=with_disk(disk)) as guest:
        report = guest.save(disk / "snapshot", engine=engine, with_disks=True)
        assert report.record == str(disk / "snapshot.vm.json")
        record = read_record(disk / "snapshot")
        assert record is not None
        (told,) = (each for each in record.disks if each.writable)
        assert (told.file, told.goes_on) == (str(disk / "image"), False)
        (medium,) = (d["inserted"] for d in guest.vm.execute("query-block") if "inserted" in d)
        assert medium["file"] == told.continued_in
        assert guest.settings() == guest.before
        if run:
            assert guest.status() == "running"
            guest.wait_for_count(guest.count() + 1)


@pytest.mark.parametrize(
    ("engine", "memory"),
    covering(
        ((engine, memory) for engine in ENGINES for memory in ("file", "private")),
        short=[("qemu", "file"), ("direct", "private")],
    ),
)
def test_disks_are_what_they_were_when_the_save_fails(engine: str, memory: str, disk: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.bytes_done == progress.bytes_total:
            raise KeyError("enough")

    with source(disk, memory=memory, extra=with_disk(disk)) as guest:
        with pytest.raises(KeyError, match="enough"):
            guest.save(disk / "snapshot", engine=engine, with_disks=True, progress=stop)
        guest.assert_as_before()
        (medium,) = (d["inserted"] for d in guest.vm.execute("query-block") if "inserted" in d)
        assert medium["file"] == str(disk / "image")


@pytest.mark.parametrize(
    ("engine", "run", "kills"),
    covering(
        ((engine, run, kills) for kills in (1, 3) for engine in ENGINES for run in (True, False)),
        short=[("qemu", True, 1), ("direct", True, 1), ("direct", False, 1)],
    ),
)
def test_disks_are_what_they_were_when_the_save_is_killed(
    engine: str, run: bool, kills: int, disk: Path
) -> None:
    with source(disk, run=run, length=128 << 20, extra=with_disk(disk)) as guest:
        for _ in range(kills):
            process = guest.start_save(disk / "snapshot", "--engine", engine, "--with-disks")
            wait_until((disk / "image.snapshot.qcow2").exists, "no overlay")
            process.kill()
            process.communicate()
            if (disk / "snapshot").exists():
                pytest.skip("the save was done before it could be killed")
            wait_until(lambda: not guest._guardians(), "the guardian does not end")
            (medium,) = (d["inserted"] for d in guest.vm.execute("query-block") if "inserted" in d)
            left = disk / "snapshot.left"
            assert medium["file"] == str(disk / "image"), left.exists() and left.read_text()
            assert guest.vm.execute("query-jobs") == []
            assert guest._files() == guest.files
            if run or engine == "direct":
                guest.assert_as_before()
            elif guest.status() == "postmigrate":
                break


def test_writable_disks_are_named_with_what_a_restore_needs(disk: Path) -> None:
    with source(disk, extra=with_disk(disk)) as guest:
        (sentence,) = guest.save(disk / "snapshot").disks
        assert "image" in sentence and "--with-disks" in sentence
