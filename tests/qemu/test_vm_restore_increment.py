"""Increments restored: memory from the base, changed pages from the increment, one instant."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import convert
from pyqmigrate.errors import NotSupported, PyqmigrateError, SnapshotError, TargetError, UsageError
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.snapshot.increment import IncrementSnapshot
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.vm import sync
from pyqmigrate.vm.incoming.early_start import start_early
from pyqmigrate.vm.incoming.options import Mode, RestoreOptions
from tests.harness.command import COMMAND
from tests.harness.covering import covering
from tests.harness.increments import save_twice, write_increment
from tests.harness.writing_guest import GuestSetup, Instant, WritingGuest, check_snapshot, restore

pytestmark = pytest.mark.qemu

MIB = 1 << 20
SETUPS = {
    machine: GuestSetup(machine, working_set=16 * MIB, filled=16 * MIB)
    for machine in ("pc", "q35", "microvm")
}


@dataclass(frozen=True)
class Saved:
    """An increment ``path`` of ``base``, and a whole snapshot ``later`` of the same instant."""

    setup: GuestSetup
    base: Path
    later: Path
    path: Path

    @property
    def directory(self) -> Path:
        return self.path.parent

    def restored(self, **options: Any) -> Any:
        return restore(self.setup, self.path, self.directory, **options)

    def command(self) -> list[str]:
        return self.setup.command(self.directory)


def make(directory: Path, machine: str = "pc") -> Saved:
    setup = SETUPS[machine]
    base, later = save_twice(setup, directory)
    path = directory / "increment"
    write_increment(base, later, path, [setup.block])
    return Saved(setup, base, later, path)


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    return make(module_disk)


def instant_of(saved: Saved) -> Instant:
    return check_snapshot(saved.later, saved.setup)


@pytest.mark.parametrize("machine", covering(SETUPS, short=["q35", "microvm"]))
def test_memory_is_that_of_the_instant_in_each_mode(machine: str, disk: Path) -> None:
    saved = make(disk, machine)
    with restore(saved.setup, saved.later, disk, mode="load", paused=True) as whole:
        memory = whole.read_ram()
    for mode in ("instant", "load"):
        with saved.restored(mode=mode, paused=True) as guest:
            assert guest.check_ram() == instant_of(saved)
            assert guest.read_ram() == memory


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_guest_goes_on_and_finds_its_memory(saved: Saved, mode: str) -> None:
    with saved.restored(mode=mode, paused=False) as guest:
        guest.wait_for_writes()
        guest.execute("stop")
        guest.check_ram()
        guest.assert_memory_held()


def test_flattened_copy_has_the_same_memory(saved: Saved, disk: Path) -> None:
    flat = disk / "flat"
    convert(saved.path, flat, to="mapped-ram")
    with (
        restore(saved.setup, flat, disk, mode="instant", paused=True) as whole,
        saved.restored(paused=True) as guest,
    ):
        assert whole.read_ram() == guest.read_ram()


def test_report_names_the_base_and_what_is_loaded(saved: Saved) -> None:
    vm = started(saved, mode="instant")
    assert str(saved.base) in vm.report.why
    assert vm.report.mapped_blocks == ("pc.ram",)
    end(vm)


def test_stale_page_of_the_base_reads_as_zeros(disk: Path) -> None:
    """As a live save leaves them: bytes in the file under a clear bit."""
    saved = make(disk)
    from pyqmigrate.io.stream_file import StreamFile

    with MappedRamSnapshot(StreamFile.open(saved.base)) as base:
        block = base.blocks["pc.ram"]
        page = next(first for first, _, data in block.runs(SETUPS["pc"].ram // 8192) if not data)
        offset = block.pages_offset + page * 4096
    times = saved.base.stat()
    with saved.base.open("r+b") as file:
        os.pwrite(file.fileno(), b"stale" * 100, offset)
    os.utime(saved.base, ns=(times.st_atime_ns, times.st_mtime_ns))
    vm = started(saved, mode="instant")
    assert vm.report.stale_pages == 1
    end(vm)
    with saved.restored(mode="instant", paused=True) as guest:
        assert guest.read_ram()[page * 4096 : page * 4096 + 500] == bytes(500)
        assert guest.check_ram() == instant_of(saved)


def started(saved: Saved, **options: Any) -> sync.RestoredVm:
    return sync.restore(
        saved.path, saved.command(), stdin=subprocess.DEVNULL, paused=True, **options
    )


def end(vm: sync.RestoredVm) -> None:
    vm.process.kill()
    vm.process.wait()


@pytest.mark.parametrize("mode", ["auto", "instant", "load"])
def test_missing_base_is_named_before_qemu_starts(disk: Path, mode: str) -> None:
    saved = make(disk)
    elsewhere = disk / "elsewhere"
    saved.base.rename(elsewhere)
    with pytest.raises(TargetError, match=r"base\.mapped"):
        started(saved, mode=mode)
    vm = started(saved, mode=mode, base=elsewhere)
    end(vm)


def test_changed_base_is_named(disk: Path) -> None:
    saved = make(disk)
    with saved.base.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"changed")
    with pytest.raises(SnapshotError, match=r"base.mapped.*modified"):
        started(saved)
    shutil.copy(saved.later, saved.base)
    with pytest.raises(SnapshotError, match=r"base.mapped"):
        started(saved)


def test_base_that_is_being_written_is_refused(saved: Saved) -> None:
    with saved.base.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TargetError, match="being written"):
            started(saved)


def test_base_of_a_whole_snapshot_is_refused(saved: Saved) -> None:
    with pytest.raises(UsageError, match="not an increment"):
        sync.restore(saved.later, saved.command(), base=saved.base, stdin=subprocess.DEVNULL)


def test_qemu_holds_a_lock_on_the_base(saved: Saved) -> None:
    vm = started(saved, mode="instant")
    try:
        with saved.base.open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        end(vm)


def test_postcopy_is_refused(saved: Saved) -> None:
    with pytest.raises(NotSupported, match="postcopy cannot load an increment"):
        started(saved, mode="postcopy")


def test_command_line_that_cannot_be_mapped_is_merged(disk: Path) -> None:
    saved = make(disk)
    options = ["-readconfig", str(disk / "memory.cfg")]
    (disk / "memory.cfg").write_text('[memory]\n  size = "128M"\n')
    vm = sync.restore(
        saved.path, [*saved.command(), *options], stdin=subprocess.DEVNULL, paused=True, mode="load"
    )
    try:
        assert vm.report.mode == "load"
        assert "merged" in " ".join(vm.report.notes)
    finally:
        end(vm)


@pytest.mark.parametrize("count", covering([2, 3], short=[2]))
def test_clones_of_an_increment_share_the_base(saved: Saved, tmp_path: Path, count: int) -> None:
    clones = sync.clone(
        saved.path, saved.command(), count, directory=tmp_path, paused=False, mode="instant"
    )
    try:
        for clone in clones:
            assert clone.error is None
            assert clone.vm is not None
            sockets = (clone.qmp, clone.qmp)
            assert clone.vm.report.run_state == "running"
            guest = WritingGuest(saved.setup, clone.vm.process, sockets, tmp_path / "none")
            guest.wait_for_writes()
            guest.execute("stop")
            guest.check_ram()
            guest.assert_memory_held()
            guest.qmp.close()
    finally:
        for clone in clones:
            if clone.vm is not None:
                end(clone.vm)


def test_command_restores_an_increment(saved: Saved) -> None:
    verb = ["vm", "restore", "--json", "--mode", "instant", str(saved.path), "--"]
    with subprocess.Popen(
        [*COMMAND, *verb, *saved.command()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "}\n")
            assert json.loads("".join(lines) + "}")["mode"] == "instant"
            process.terminate()  # QEMU ends, with 0
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_qemu_of_an_increment_starts_before_the_event_loop(saved: Saved) -> None:
    options = RestoreOptions(mode=Mode.INSTANT, stdin=subprocess.DEVNULL)
    start = start_early(str(saved.path), saved.command(), options)
    assert start is not None
    early = start.result()
    assert early is not None
    early.end()


def test_empty_pages_of_video_memory_are_not_loaded(saved: Saved) -> None:
    """Each guest would have a private copy of them."""
    with IncrementSnapshot(StreamFile.open(saved.path)) as snapshot:
        others = [block for block in snapshot.blocks.values() if block.name != "pc.ram"]
        assert others
        for block in others:
            base_only = block.base_only()
            assert base_only.count() == 0
            base_only.close()
            assert block.changed_pages < 1000


# As test_vm_restore_signals.py: the command, which has a signal come when it calls this function.
AT = """
import asyncio, importlib, os, sys, time
module, name, number = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
home = importlib.import_module(module)
original = getattr(home, name)
def with_signal(*arguments, **options):
    try:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
    except RuntimeError:  # in the thread of an instant restore, for which the main thread waits
        os.kill(os.getpid(), number)
        time.sleep(0.3)
    return original(*arguments, **options)
setattr(home, name, with_signal)
from pyqmigrate.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("mode", "number"),
    covering(
        ((mode, n) for mode in ("instant", "load") for n in (signal.SIGINT, signal.SIGTERM)),
        short=[("instant", signal.SIGTERM), ("load", signal.SIGINT)],
    ),
)
def test_signal_during_the_load_leaves_no_qemu(
    saved: Saved, mode: str, number: signal.Signals
) -> None:
    mark = f"signal-{mode}-{int(number)}"
    function = ["pyqmigrate.vm.incoming.loading", "_wait", str(int(number))]
    verb = ["vm", "restore", "--mode", mode, str(saved.path), "--", *saved.command()]
    done = subprocess.run(
        [sys.executable, "-c", AT, *function, *verb, "-name", mark],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (130, -signal.SIGINT), done.stderr
    assert not [entry for entry in Path("/proc").glob("[0-9]*") if mark in _command_line(entry)], (
        "QEMU lives on"
    )


def _command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text(errors="replace")
    except OSError:  # it has ended
        return ""


def test_damaged_base_is_an_error(disk: Path) -> None:
    saved = make(disk)
    os.truncate(saved.base, 2 * MIB)
    with pytest.raises(PyqmigrateError, match="base"):
        started(saved)


def test_next_increment_is_of_the_same_base(saved: Saved, disk: Path) -> None:
    """A guest of an increment maps the base: no chain of increments comes about."""
    second = disk / "second"
    with saved.restored(mode="instant", paused=False) as guest:
        guest.wait_for_writes(500)
        report = sync.connect(guest.socket).save(second, base="auto")
        assert Path(str(report.base)).samefile(saved.base)
        guest.wait_for_writes(500)
        guest.assert_memory_held()
    instant = check_snapshot(second, saved.setup)
    assert instant > instant_of(saved)
    for mode in ("instant", "load"):
        with restore(saved.setup, second, disk, mode=mode, paused=False) as guest:
            guest.wait_for_writes()
            guest.execute("stop")
            guest.check_ram()
            guest.assert_memory_held()


@pytest.mark.long
def test_guests_of_ten_increments_share_the_base(disk: Path) -> None:
    """Of their memory, all that is private is what changed."""
    setup = GuestSetup("pc", ram=768 * MIB, working_set=20 * MIB, filled=500 * MIB)
    base, later = save_twice(setup, disk, 5120)
    path = disk / "increment"
    write_increment(base, later, path, [setup.block])
    changed = path.stat().st_blocks * 512
    alone = sync.restore(
        base, setup.command(disk), mode="instant", stdin=subprocess.DEVNULL, paused=True
    )
    _touch(alone.process.pid, base)
    one = _pss(alone.process.pid)
    end(alone)
    guests: list[sync.RestoredVm] = []
    try:
        for number in range(10):
            copy = disk / f"increment{number}"
            shutil.copy(path, copy)
            guests.append(
                sync.restore(
                    copy, setup.command(disk), mode="instant", stdin=subprocess.DEVNULL, paused=True
                )
            )
        for guest in guests:
            _touch(guest.process.pid, base)
        both = sum(_pss(guest.process.pid) for guest in guests)
    finally:
        for guest in guests:
            end(guest)
    print(f"one {one >> 20} MiB, ten {both >> 20}, changed {changed >> 20} each", file=sys.stderr)
    own = 10 * (12 << 20)  # of each QEMU
    assert both <= one + 1.2 * 10 * changed + own


def _touch(pid: int, base: Path) -> None:
    """Have every page of the guest's memory in its page table."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if line.endswith(str(base)):
                start, stop = (int(number, 16) for number in line.split()[0].split("-"))
                for address in range(start, stop, 16 * MIB):
                    os.pread(memory.fileno(), min(16 * MIB, stop - address), address)


def _pss(pid: int) -> int:
    """Return the proportional set size of a process, bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
