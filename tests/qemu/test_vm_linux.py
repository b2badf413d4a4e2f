"""A Linux with a shell, saved while it runs and restored: the shell goes on where it was."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.linux_guest import Console, LinuxGuest
from tests.harness.verbs import restored, save

pytestmark = pytest.mark.qemu

MARKER = "kept-in-tmpfs"


@dataclass(frozen=True)
class Saved:
    """A snapshot of a Linux, and what is known about it.

    ``uptime`` in seconds and ``count`` are from shortly before the save; ``checksum`` is that of a
    file of random bytes in the guest; ``after`` is what the guest, going on, answered.
    """

    guest: LinuxGuest
    snapshot: Path
    uptime: float
    count: int
    checksum: str
    after: str


def uptime(console: Console) -> float:
    return float(console.run("cat /proc/uptime").split()[0])


def count(console: Console) -> int:
    return int(console.run("cat count"))


@pytest.fixture(scope="module")
def linux(module_disk: Path) -> Iterator[tuple[LinuxGuest, Console]]:
    """Booted once; files, a variable and a process in the background are what it is known by."""
    guest = LinuxGuest(module_disk)
    with guest.boot() as console:
        console.run(f"echo {MARKER} > marker; variable={MARKER}; echo 0 > count")
        console.run("dd if=/dev/urandom of=random bs=64k count=64 2>/dev/null")
        console.run("while sleep 0.02; do i=$((i + 1)); echo $i > new; mv new count; done &")
        yield guest, console


@pytest.fixture(scope="module", params=["direct", "qemu"])
def saved(
    request: pytest.FixtureRequest, linux: tuple[LinuxGuest, Console], module_disk: Path
) -> Iterator[Saved]:
    """Saved while it runs; it goes on."""
    guest, console = linux
    snapshot = module_disk / f"linux-{request.param}"
    before = uptime(console), count(console), console.run("md5sum < random")
    report = save(guest.qmp, snapshot, "--engine", request.param, "--then", "resume")
    assert report["engine"] == request.param
    yield Saved(guest, snapshot, *before, console.run("cat marker"))
    snapshot.unlink()


@pytest.fixture(scope="module", params=["instant", "load"])
def again(
    request: pytest.FixtureRequest, saved: Saved, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Console]:
    """The console of a guest restored from the snapshot; the one that was saved still runs."""
    path = tmp_path_factory.mktemp("again") / "console"
    command = saved.guest.command(path)
    with (
        restored(saved.snapshot, command, "--mode", request.param) as report,
        Console(path) as console,
    ):
        assert (report["mode"], report["run_state"]) == (request.param, "running")
        yield console


def test_linux_goes_on_after_it_was_saved(saved: Saved) -> None:
    assert saved.after == MARKER


def test_shell_of_a_restored_linux_has_its_variable(again: Console) -> None:
    assert again.run("echo $variable") == MARKER


def test_files_of_a_restored_linux_are_whole(saved: Saved, again: Console) -> None:
    assert again.run("cat marker") == MARKER
    assert again.run("md5sum < random") == saved.checksum


def test_clock_of_a_restored_linux_goes_on_from_the_save(saved: Saved, again: Console) -> None:
    now = uptime(again)
    assert saved.uptime < now
    time.sleep(0.1)
    assert uptime(again) > now


def test_process_of_a_restored_linux_goes_on_counting(saved: Saved, again: Console) -> None:
    now = count(again)
    assert saved.count <= now
    again.run(f"until [ $(cat count) -gt {now + 3} ]; do sleep 0.02; done")


def test_restored_linux_starts_new_processes(again: Console) -> None:
    assert again.run("sh -c 'seq 1000 | tail -n 1'") == "1000"


def test_restored_linux_does_not_complain(again: Console) -> None:
    """A lost page or a clock that jumped shows in the kernel's log."""
    log = again.run("dmesg")
    assert "Linux version" in log
    assert not re.search(r"BUG|Oops|corrupt|soft lockup|stall|Call Trace", log)
