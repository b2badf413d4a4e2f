"""Whatever happens to a save, the guest is what it was, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pyqmigrate.errors import QemuError, QemuGone, TargetError
from pyqmigrate.io.output import OutputFile
from pyqmigrate.vm.guest.memory import GuestBlock, find_memory
from pyqmigrate.vm.outgoing.save import save
from pyqmigrate.vm.outgoing.transaction import SaveTransaction
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.covering import covering
from tests.harness.killed_saves import OLD, assert_old_or_whole, save_on, wait_for_touch
from tests.harness.saving import ROOT, Source, source, wait_until

pytestmark = pytest.mark.qemu

ENGINES = ["qemu", "direct"]
LARGE = 128 << 20


# The command, on a file system without files that have no name (O_TMPFILE).
NAMED = """
import errno, os, sys
from pyqmigrate.cli import main
real = os.open
def open(path, flags, *rest, **more):
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, "no unnamed files here")
    return real(path, flags, *rest, **more)
os.open = open
sys.exit(main(sys.argv[1:]))
"""

SLOW_TO_OPEN = """
import time
from pyqmigrate.io.output import OutputFile
open_direct = OutputFile._open_direct
OutputFile._open_direct = lambda *arguments: (time.sleep(1), open_direct(*arguments))[1]
"""


SAVED = ["snapshot", "snapshot.vm.json"]


@pytest.mark.parametrize("run", [True, False], ids=["running", "paused"])
def test_no_space_is_seen_before_qemu_is_touched(run: bool, disk: Path) -> None:
    with source(disk, run=run) as guest:
        code, errors, left = save_on(guest, "tmpfs -o size=8m")
        assert (code, left) == (3, []), errors
        assert "MiB are free" in errors
        guest.assert_as_before()


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_whose_fast_save_does_not_fit_is_saved_without_its_zero_pages(
    engine: str, disk: Path
) -> None:
    """It is speckled: what is fast writes half as much again, or all of it."""
    with source(disk, run=False, length=LARGE) as guest:
        guest.ram.memory[:] = (b"x" * 4096 + bytes(4096)) * (LARGE // 8192)
        code, errors, left = save_on(
            guest, f"tmpfs -o size={(LARGE >> 21) + 12}m", "--engine", engine
        )
        assert (code, left[-2:]) == (0, SAVED), errors
        assert any("sparse exact" in line for line in left)


@pytest.mark.parametrize("engine", ENGINES)
def test_running_guest_survives_that_space_runs_out(engine: str, disk: Path) -> None:
    with source(disk) as guest:
        code, errors, left = save_on(guest, "tmpfs -o size=8m", "--engine", engine, blind=True)
        assert (code, left) == (3, []), errors
        assert "No space left" in errors
        guest.assert_as_before()


@pytest.mark.parametrize("engine", ENGINES)
def test_paused_guest_survives_that_space_runs_out(engine: str, disk: Path) -> None:
    with source(disk, run=False) as guest:
        code, errors, left = save_on(guest, "tmpfs -o size=8m", "--engine", engine, blind=True)
        assert (code, left) == (3, []), errors
        guest.assert_as_before()


@pytest.mark.parametrize("engine", ENGINES)
def test_directory_without_direct_io_is_written_buffered(engine: str, disk: Path) -> None:
    with source(disk) as guest:
        code, errors, left = save_on(guest, "ramfs", "--engine", engine)
        assert (code, errors, left[-2:]) == (0, "", SAVED)
        assert any("direct I/O off" in line for line in left)
        guest.assert_as_before()


@pytest.mark.parametrize("engine", ENGINES)
def test_direct_io_that_is_not_available_is_refused_before_qemu_is_touched(
    engine: str, disk: Path
) -> None:
    with source(disk) as guest:
        code, errors, left = save_on(guest, "ramfs", "--engine", engine, "--direct-io", "on")
        assert (code, left) == (3, []), errors
        assert "direct I/O is not possible" in errors
        guest.assert_as_before()


def test_path_that_cannot_be_written_leaves_the_guest_alone(disk: Path) -> None:
    with source(disk) as guest:
        for path in (disk / "missing" / "snapshot", disk):
            with pytest.raises(TargetError):
                guest.save(path)
        guest.assert_as_before()


@pytest.mark.parametrize("engine", ENGINES)
def test_cancelled_save_leaves_the_guest_as_it_was(engine: str, disk: Path) -> None:
    async def cancelled(guest: Source, after: float) -> bool:
        task = asyncio.ensure_future(save(guest.socket, disk / "snapshot", engine=engine))
        await asyncio.sleep(after)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return True
        return False

    with source(disk, length=LARGE) as guest:
        (disk / "snapshot").write_bytes(OLD)
        guest.files.add("snapshot")
        outcomes = []
        for after in (0.01, 0.07, 0.2):
            outcomes.append(asyncio.run(cancelled(guest, after)))
            guest.assert_as_before()
            assert_old_or_whole(disk / "snapshot")
        assert any(outcomes)


def test_save_cancelled_while_its_file_is_opened_leaves_none(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()
    real = OutputFile._open_direct

    def slow(target: OutputFile, *arguments: Any) -> None:
        opened.set()
        time.sleep(0.3)
        real(target, *arguments)

    monkeypatch.setattr(OutputFile, "_open_direct", slow)
    # A file system without unnamed files.
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)

    async def cancelled(guest: Source) -> None:
        task = asyncio.ensure_future(save(guest.socket, disk / "snapshot"))
        await asyncio.to_thread(opened.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with source(disk) as guest:
        descriptors = open_descriptors()
        asyncio.run(cancelled(guest))
        assert open_descriptors() == descriptors
        guest.assert_as_before()


def test_save_cancelled_while_it_looks_keeps_no_memory_open(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = threading.Event()

    def slow(*arguments: Any) -> list[GuestBlock]:
        looking.set()
        time.sleep(0.3)
        return find_memory(*arguments)

    monkeypatch.setattr("pyqmigrate.vm.guest.inspect.find_memory", slow)

    async def cancelled(guest: Source) -> None:
        task = asyncio.ensure_future(save(guest.socket, disk / "snapshot"))
        await asyncio.to_thread(looking.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with source(disk) as guest:
        descriptors = open_descriptors()
        asyncio.run(cancelled(guest))
        assert open_descriptors() == descriptors
        guest.assert_as_before()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_killed_save_leaves_no_file_that_had_to_have_a_name(disk: Path) -> None:
    """It is killed before the guardian hears of the file."""
    with source(disk, length=64 << 20) as guest:
        for _ in range(2):
            command = [sys.executable, "-c", SLOW_TO_OPEN + NAMED, "vm", "save"]
            process = subprocess.Popen(
                [*command, "--qmp", str(guest.socket), str(disk / "snapshot")], cwd=ROOT
            )
            wait_until(lambda: any(disk.glob(".snapshot.*.partial")), "no unfinished file")
            process.kill()
            process.wait()
            guest.assert_as_before(within=30)


@pytest.mark.parametrize("engine", ENGINES)
def test_progress_that_raises_ends_the_save(engine: str, disk: Path) -> None:
    class Enough(Exception):
        pass

    def stop(_: object) -> NoReturn:
        raise Enough

    with source(disk, length=LARGE) as guest:
        with pytest.raises(Enough):
            guest.save(disk / "snapshot", engine=engine, progress=stop)
        guest.assert_as_before()


@pytest.mark.parametrize(
    ("engine", "number"),
    covering(
        ((engine, number) for engine in ENGINES for number in (signal.SIGINT, signal.SIGTERM)),
        short=[("qemu", signal.SIGINT), ("direct", signal.SIGTERM)],
    ),
)
def test_interrupted_command_puts_the_guest_back_before_it_ends(
    engine: str, number: signal.Signals, disk: Path
) -> None:
    with source(disk, length=LARGE) as guest:
        process = guest.start_save(disk / "snapshot", "--engine", engine)
        wait_for_touch(guest)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        guest.assert_as_before()


@pytest.mark.parametrize(
    ("memory", "run", "kills", "named"),
    covering(
        [
            ("file", True, 3, False),
            ("private", True, 50, False),
            ("file", True, 50, False),
            ("private", False, 50, False),
            ("file", True, 50, True),
        ],
        short=[("file", True, 3, False)],
    ),
)
def test_guest_survives_that_the_command_is_killed(
    memory: str, run: bool, kills: int, named: bool, disk: Path
) -> None:
    # What engine qemu makes of a paused guest cannot be undone once it is complete.
    killed_at_random(disk, memory, run, kills, ENGINES if run else ["direct"], named=named)


@pytest.mark.long
@pytest.mark.parametrize("named", [False, True], ids=["unnamed file", "named file"])
def test_paused_guest_survives_that_qemus_save_is_killed(named: bool, disk: Path) -> None:
    """It keeps still, in postmigrate where the save was complete; it goes on when it is told to."""
    killed_at_random(disk, "file", False, 50, ["qemu"], named=named)


def killed_at_random(
    disk: Path, memory: str, run: bool, kills: int, engines: list[str], *, named: bool
) -> None:
    choose = random.Random(kills)
    with source(disk, memory=memory, length=64 << 20, run=run) as guest:
        (disk / "snapshot").write_bytes(OLD)
        guest.files.add("snapshot")
        whole, killed = 2.0, 0
        for number in range(3 * kills):
            started = time.monotonic()
            process = guest.start_save(
                disk / "snapshot",
                "--engine",
                engines[number % len(engines)],
                program=NAMED if named else None,
            )
            try:
                process.wait(choose.uniform(whole / 4, whole))
                whole = min(whole, time.monotonic() - started)  # it was done before
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
            process.communicate(timeout=60)
            if not run and engines == ["qemu"]:
                as_found_or_postmigrate(guest)
            guest.assert_as_before(within=30)
            assert_old_or_whole(disk / "snapshot")
            if killed == kills:
                return
    raise AssertionError(f"{killed} kills came in time: the test proves little")


def as_found_or_postmigrate(guest: Source) -> None:
    """What became of a paused guest; from postmigrate it is made to run, and paused again."""
    wait_until(lambda: not guest._guardians(), "the guardian does not end", 30)
    if guest.status() == "postmigrate":
        count = guest.count()
        guest.vm.execute("cont")
        guest.wait_for_count(count + 1)
        guest.vm.execute("stop")


@pytest.mark.parametrize("engine", ENGINES)
def test_guest_survives_a_kill_in_the_midst_of_a_save(engine: str, disk: Path) -> None:
    with source(disk, length=LARGE) as guest:
        process = guest.start_save(disk / "snapshot", "--engine", engine)
        wait_for_touch(guest)
        process.kill()
        process.communicate(timeout=60)
        guest.assert_as_before(within=30)


@pytest.mark.parametrize("engine", ENGINES)
def test_qemu_that_dies_is_reported_as_that(engine: str, disk: Path) -> None:
    with source(disk, length=LARGE) as guest:

        def kill(_: object) -> None:
            guest.vm.process.kill()
            guest.vm.process.wait()

        with pytest.raises(QemuGone) as raised:
            guest.save(disk / "snapshot", engine=engine, progress=kill)
        assert any("has ended" in note for note in raised.value.__notes__)
        assert guest._files() <= guest.files
        assert guest._guardians() == []


def test_second_save_at_the_same_time_names_the_other_client(disk: Path) -> None:
    async def two(guest: Source) -> None:
        async with await Monitor.connect(guest.socket):
            started = time.monotonic()
            with pytest.raises(QemuError, match="another client"):
                await save(guest.socket, disk / "snapshot")
            assert 4.5 < time.monotonic() - started < 8

    with source(disk) as guest:
        asyncio.run(two(guest))
        guest.assert_as_before()


def test_migration_of_another_client_is_left_alone(disk: Path) -> None:
    with source(disk) as guest:
        guest.vm.execute("migrate-set-parameters", {"max-bandwidth": 4096})
        guest.vm.execute("migrate", {"uri": f"file:{disk}/other"})
        with pytest.raises(QemuError, match="under way"):
            guest.save(disk / "snapshot")
        assert guest.vm.execute("query-migrate")["status"] in ("setup", "active")
        guest.vm.execute("migrate_cancel")
        assert not (disk / "snapshot").exists()


class Interloper:
    """Another client, at the second monitor, begins a migration just before a step of a save."""

    def __init__(self, guest: Source, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        self.vm = guest.vm
        self.file = guest.directory / "other"
        method = getattr(SaveTransaction, step)

        async def later(*arguments: Any) -> None:
            self.begin()
            await method(*arguments)

        monkeypatch.setattr(SaveTransaction, step, later)

    def begin(self) -> None:
        self.vm.set_capabilities({"x-ignore-shared": False, "pause-before-switchover": False})
        self.vm.execute(
            "migrate-set-parameters", {"max-bandwidth": 4096, "avail-switchover-bandwidth": 0}
        )
        self.vm.execute("migrate", {"uri": f"file:{self.file}"})
        wait_until(lambda: self.vm.execute("query-migrate")["status"] != "setup", "no migration")

    def assert_undisturbed(self) -> None:
        for _ in range(3):
            time.sleep(0.2)
            assert self.vm.execute("query-migrate")["status"] == "active"
            assert self.vm.execute("query-migrate-parameters")["max-bandwidth"] == 4096

    def end(self) -> None:
        self.vm.execute("migrate-set-parameters", {"max-bandwidth": 134217728})
        self.vm.execute("migrate_cancel")
        wait_until(
            lambda: self.vm.execute("query-migrate")["status"] == "cancelled", "it does not end"
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_migration_begun_by_another_client_during_a_save_is_left_alone(
    engine: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with source(disk, length=LARGE) as guest:
        guest.files.add("other")
        other = Interloper(guest, monkeypatch, "apply")
        with pytest.raises(QemuError, match="under way"):
            guest.save(disk / "snapshot", engine=engine)
        assert guest.vm.execute("query-fdsets") == []
        other.assert_undisturbed()
        other.end()
        guest.assert_as_before(within=30)


@pytest.mark.parametrize("engine", ENGINES)
def test_migration_of_another_client_that_was_faster_is_left_alone(
    engine: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has settings of the save, which are restored when it has ended."""
    with source(disk, length=LARGE) as guest:
        guest.files.add("other")
        other = Interloper(guest, monkeypatch, "migrate")
        with pytest.raises(QemuError, match=r"migrat.* in progress") as raised:
            guest.save(disk / "snapshot", engine=engine)
        assert any("a guardian process waits" in note for note in raised.value.__notes__)
        assert guest.status() == "running"
        assert guest.vm.execute("query-fdsets") == []
        other.assert_undisturbed()
        other.end()
        guest.assert_as_before(within=30)
