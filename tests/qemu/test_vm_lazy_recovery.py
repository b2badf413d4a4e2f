"""A lazily restored guest survives its page server, and the process that restored it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pyqmigrate.errors import QemuError, QemuGone
from pyqmigrate.vm.incoming.lazy_state import LazyState
from pyqmigrate.vm.incoming.lazy_status import wait_for_memory
from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.incoming.restore import restore
from tests.harness.lazy_guests import children_of, kill_server, server_of
from tests.harness.saved import RAM, Saved, goes_on, save_guest, serial_says

pytestmark = pytest.mark.qemu

_PATIENCE = 60.0


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_guest(tmp_path_factory.mktemp("pc"), ["-M", "pc", "-m", str(RAM >> 20)])


async def _lazy(saved: Saved, serial: Path, **options: object) -> RestoredVm:
    serial.unlink(missing_ok=True)
    return await restore(saved.path, saved.command(serial=serial), mode="lazy", **options)  # type: ignore[arg-type]


async def _counts_on(saved: Saved, serial: Path) -> None:
    """AssertionError unless the guest counts on; its memory cannot be read while pages are missing."""
    said = await asyncio.to_thread(serial_says, serial, 2)
    assert said[0] == len(saved.reports) + 1


async def _killed(saved: Saved, serial: Path, kills: int, chance: random.Random) -> LazyState:
    """Restore a guest whose server is killed so often, at any time; it must be right in the end."""
    vm = await _lazy(saved, serial)
    assert vm.lazy is not None
    try:
        while vm.lazy.state.restarts < kills and not vm.lazy.state.ended:
            kill_server(vm)
            await asyncio.sleep(chance.random() * 0.15)
        state = await asyncio.wait_for(vm.lazy.completed(), _PATIENCE)
        await goes_on(saved, vm, serial)
        return state
    finally:
        await vm.end()


def test_a_killed_page_server_is_replaced_and_the_guest_is_right(
    saved: Saved, tmp_path: Path
) -> None:
    state = asyncio.run(_killed(saved, tmp_path / "out", 5, random.Random(16)))
    assert state.restarts >= 1
    assert state.pages_left == 0


@pytest.mark.long
def test_a_hundred_kills_lose_no_guest(saved: Saved, tmp_path: Path) -> None:
    chance, kills = random.Random(17), 0
    while kills < 100:
        kills += asyncio.run(_killed(saved, tmp_path / "out", 5, chance)).restarts


def test_stop_is_answered_although_the_server_was_killed(saved: Saved, tmp_path: Path) -> None:
    async def run() -> None:
        vm = await _lazy(saved, tmp_path / "out", push="never")
        assert vm.lazy is not None
        try:
            assert kill_server(vm)
            await vm.monitor.execute("stop", timeout=_PATIENCE)
            await vm.monitor.execute("cont", timeout=_PATIENCE)
            await _counts_on(saved, tmp_path / "out")
            assert vm.lazy.state.restarts == 1
        finally:
            await vm.end()

    asyncio.run(run())


def test_the_memory_arrives_although_the_session_was_closed(saved: Saved, tmp_path: Path) -> None:
    async def run() -> None:
        vm = await _lazy(saved, tmp_path / "out")
        try:
            await vm.close()
            state = await asyncio.wait_for(wait_for_memory(vm.process.pid), _PATIENCE)
            assert state.pages_left == 0
            assert (await wait_for_memory(vm.process.pid)).state == "completed"
        finally:
            await vm.end()

    asyncio.run(run())


def test_nothing_is_left_when_qemu_quits_while_pages_are_missing(
    saved: Saved, tmp_path: Path
) -> None:
    async def run() -> tuple[int, int]:
        vm = await _lazy(saved, tmp_path / "out", push="never")
        assert vm.lazy is not None
        keeper, server = vm.lazy.process.pid, server_of(vm)
        assert server is not None
        waiting = asyncio.create_task(wait_for_memory(vm.process.pid))
        await asyncio.sleep(0.1)
        await vm.monitor.execute("quit")
        assert await vm.wait() == 0
        with pytest.raises(QemuGone, match="ended before it had all of its memory"):
            await asyncio.wait_for(waiting, _PATIENCE)
        with pytest.raises(QemuError, match="QEMU has ended"):
            await asyncio.wait_for(vm.lazy.completed(), _PATIENCE)
        await vm.end()
        return keeper, server

    for pid in asyncio.run(run()):
        assert _ends(pid)


def _ends(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_keeper_that_is_killed_leaves_the_server_at_work(saved: Saved, tmp_path: Path) -> None:
    async def run() -> None:
        vm = await _lazy(saved, tmp_path / "out")
        assert vm.lazy is not None
        try:
            vm.lazy.process.kill()
            with pytest.raises(QemuError, match="keeper"):
                await vm.lazy.completed()
            await goes_on(saved, vm, tmp_path / "out")
        finally:
            await vm.end()

    asyncio.run(run())


def test_a_restore_that_is_cancelled_leaves_no_process(saved: Saved, tmp_path: Path) -> None:
    before = set(children_of(os.getpid()))

    async def run() -> None:
        task = asyncio.create_task(_lazy(saved, tmp_path / "out"))
        await asyncio.sleep(0.08)  # its keeper is starting
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert set(children_of(os.getpid())) <= before


@pytest.mark.parametrize("command", ["system_reset", "stop"])
def test_commands_work_while_pages_are_missing(command: str, saved: Saved, tmp_path: Path) -> None:
    async def run() -> None:
        vm = await _lazy(saved, tmp_path / "out", push="never")
        assert vm.lazy is not None
        try:
            await vm.monitor.execute(command, timeout=_PATIENCE)
            if command == "stop":
                await vm.monitor.execute("cont", timeout=_PATIENCE)
                await _counts_on(saved, tmp_path / "out")
            else:
                assert await asyncio.wait_for(vm.wait(), _PATIENCE) == 0  # -no-reboot
        finally:
            await vm.end()

    asyncio.run(run())


def test_a_save_is_refused_while_pages_are_missing(saved: Saved, tmp_path: Path) -> None:
    async def run() -> subprocess.CompletedProcess[str]:
        vm = await _lazy(saved, tmp_path / "out", push="never", qmp=tmp_path / "qmp")
        try:
            return await asyncio.to_thread(
                subprocess.run,
                [*_command(), "save", "--qmp", str(tmp_path / "qmp"), str(tmp_path / "again")],
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
            )
        finally:
            await vm.end()

    done = asyncio.run(run())
    assert done.returncode == 4
    assert "under way" in done.stderr
    assert not (tmp_path / "again").exists()


def _command() -> list[str]:
    import sys

    return [sys.executable, "-m", "pyqmigrate", "vm"]


def test_a_signal_to_the_terminal_does_not_reach_the_keeper(saved: Saved, tmp_path: Path) -> None:
    async def run() -> None:
        vm = await _lazy(saved, tmp_path / "out", push="never")
        assert vm.lazy is not None
        try:
            for number in (signal.SIGINT, signal.SIGHUP):
                vm.lazy.process.send_signal(number)
            await asyncio.sleep(0.1)
            assert vm.lazy.process.poll() is None
            assert os.getpgid(vm.lazy.process.pid) != os.getpgid(0)
        finally:
            await vm.end()

    asyncio.run(run())
