"""The working set of a restored guest: recorded once, read ahead by later restores."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyqmigrate import vm
from pyqmigrate.errors import UsageError
from pyqmigrate.io.page_cache import cached_bytes
from pyqmigrate.io.working_set_file import read_working_set, working_set_path
from tests.harness.command import COMMAND
from tests.harness.walking_guest import PAGE, WalkingGuest

pytestmark = pytest.mark.qemu

MIB = 1 << 20
WORKING_SET = 16 * MIB


@pytest.fixture(scope="module")
def guest(module_disk: Path) -> WalkingGuest:
    guest = WalkingGuest(module_disk, WORKING_SET)
    guest.save()
    return guest


@pytest.fixture
def recorded(guest: WalkingGuest) -> Path:
    path = working_set_path(guest.path)
    path.unlink(missing_ok=True)
    guest.record(2)
    return path


def test_recording_has_the_touched_pages_and_few_others(
    guest: WalkingGuest, recorded: Path
) -> None:
    found = read_working_set(recorded)
    assert found is not None
    first = (16 * MIB) // PAGE
    touched = {first + n // 16 * 64 + n % 16 for n in range(WORKING_SET // PAGE)}
    pages = {
        page
        for run in found.working_set
        if found.blocks[run.block].name == "pc.ram"
        for page in range(run.first, run.first + run.npages)
    }
    assert touched <= pages
    assert len(pages) < 1.5 * len(touched)


def test_later_restore_reads_it_ahead(guest: WalkingGuest, recorded: Path) -> None:
    _, report = guest.seconds_to_walk()
    found = read_working_set(recorded)
    assert found is not None
    assert report.recorded_pages == found.working_set.npages
    assert report.prefetched_bytes == report.recorded_pages * PAGE
    assert not any("working set" in note for note in report.notes)


def test_paused_guest_has_its_working_set_in_the_page_cache(
    guest: WalkingGuest, recorded: Path
) -> None:
    guest.forget()

    async def run() -> int:
        restored = await vm.restore(
            guest.path, guest.command, mode="instant", stdin=subprocess.DEVNULL, paused=True
        )
        try:
            await asyncio.sleep(0.5)
            with guest.path.open("rb") as file:
                return cached_bytes(file.fileno())
        finally:
            await restored.end()

    assert asyncio.run(run()) >= WORKING_SET


@pytest.mark.parametrize("fault", ["damaged", "empty", "of another", "a directory"])
def test_file_that_cannot_be_used_does_not_hurt(
    guest: WalkingGuest, recorded: Path, fault: str
) -> None:
    content = recorded.read_bytes()
    recorded.unlink()
    if fault == "damaged":
        recorded.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif fault == "empty":
        recorded.touch()
    elif fault == "of another":
        recorded.write_bytes(content.replace(b'"mtime_ns": 1', b'"mtime_ns": 2', 1))
    else:
        recorded.mkdir()
    try:
        _, report = guest.seconds_to_walk()
    finally:
        shutil.rmtree(recorded) if recorded.is_dir() else recorded.unlink()
    assert report.prefetched_bytes == 0
    assert any("working set" in note for note in report.notes)


def test_without_a_record_nothing_is_reported(guest: WalkingGuest) -> None:
    working_set_path(guest.path).unlink(missing_ok=True)
    _, report = guest.seconds_to_walk()
    assert (report.recorded_pages, report.prefetched_bytes) == (0, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_that_is_ended_writes_what_it_has_seen(
    guest: WalkingGuest, number: signal.Signals
) -> None:
    path = working_set_path(guest.path)
    path.unlink(missing_ok=True)
    options = ["--json", "--record", "600", "--running", str(guest.path), "--", *guest.command]
    with subprocess.Popen(
        [*COMMAND, "vm", "restore", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "}\n")
            assert json.loads("".join(lines) + "}")["recorded_pages"] == 0
            time.sleep(1)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "recorded" in errors, errors
    found = read_working_set(path)
    assert found is not None
    assert found.working_set.npages > 100


def test_closing_the_session_writes_what_was_seen(guest: WalkingGuest) -> None:
    path = working_set_path(guest.path)
    path.unlink(missing_ok=True)

    async def run() -> None:
        restored = await vm.restore(
            guest.path, guest.command, stdin=subprocess.DEVNULL, paused=False, record=600
        )
        await asyncio.sleep(0.5)
        await restored.close()
        assert restored.recording is not None
        assert restored.recording.result().path == path
        await restored.end()

    asyncio.run(run())
    assert read_working_set(path) is not None


def test_recording_that_cannot_be_made_is_refused(guest: WalkingGuest, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="modes instant and lazy"):
        asyncio.run(vm.restore(guest.path, guest.command, mode="load", record=1))
    with pytest.raises(UsageError, match="more than 0"):
        asyncio.run(vm.restore(guest.path, guest.command, record=0))
    path = working_set_path(guest.path)
    path.unlink(missing_ok=True)
    path.write_text("a file of the user's")
    try:
        with pytest.raises(UsageError, match="would replace"):
            asyncio.run(vm.restore(guest.path, guest.command, record=1))
    finally:
        path.unlink()


@pytest.mark.long
def test_cold_walk_is_faster_with_its_record(disk: Path) -> None:
    """The target is 0.4 of the time without; other work on the machine may raise it."""
    guest = WalkingGuest(disk, 300 * MIB)
    guest.save()
    guest.record(8)
    path, aside = working_set_path(guest.path), disk / "aside"
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(5):
        times[True].append(guest.seconds_to_walk()[0])
        path.rename(aside)
        times[False].append(guest.seconds_to_walk()[0])
        aside.rename(path)
    print({with_record: sorted(seconds) for with_record, seconds in times.items()}, file=sys.stderr)
    assert sorted(times[True])[2] < 0.7 * sorted(times[False])[2]
