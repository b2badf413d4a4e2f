"""A pool of guests on a real QEMU: each as in the snapshot, and nothing left of those that ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pyqmigrate.errors import QemuError, TargetError, UsageError
from pyqmigrate.vm import Monitor, Pool, PooledGuest
from pyqmigrate.vm.guest.ramblock import parse_ramblock
from tests.harness.compare_memory import assert_same_blocks, assert_same_memory
from tests.harness.pools import is_alive, until
from tests.harness.saved import RAM, Saved, goes_on, memory_of, save_guest

pytestmark = pytest.mark.qemu

PAGE = 4096
SAMPLED = 64  # pages
MICROVM = ["-M", "microvm", "-m", str(RAM >> 20)]


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    return save_guest(module_disk, MICROVM, ("microvm.ram",))


@pytest.fixture
def command(saved: Saved, tmp_path: Path) -> list[str]:
    return saved.command(serial=tmp_path / "serial-{n}")


@contextlib.asynccontextmanager
async def nothing_left(directory: Path) -> AsyncIterator[None]:
    """AssertionError if descriptors, child processes, or sockets in ``directory`` are left at the end."""
    fds, children = set(os.listdir("/proc/self/fd")), child_processes()
    yield
    assert child_processes() <= children
    # A thread that reads standard error of an ended QEMU closes it a moment later.
    await asyncio.to_thread(
        until, lambda: len(os.listdir("/proc/self/fd")) <= len(fds), "descriptors are left"
    )
    assert [path for path in directory.rglob("*") if path.is_socket()] == []


def child_processes() -> set[str]:
    found = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            found |= set(task.read_text().split())
    return found


async def assert_as_saved(guest: PooledGuest, saved: Saved, rng: random.Random | None) -> None:
    """Compare the memory of a paused guest: all of it, or pages that ``rng`` chooses."""
    if rng is None:
        assert_same_blocks(await memory_of(guest.monitor, guest.pid), saved.memory)
        return
    table = {line.name: line for line in parse_ramblock(await guest.monitor.hmp("info ramblock"))}
    name = saved.blocks[0]
    with Path(f"/proc/{guest.pid}/mem").open("rb", buffering=0) as memory:
        for _ in range(SAMPLED):
            offset = rng.randrange(table[name].length // PAGE) * PAGE
            memory.seek(table[name].host_address + offset)
            page = saved.memory[name][offset : offset + PAGE]
            assert_same_memory(memory.read(PAGE), page, f"{name} at {offset:#x}")


async def reset_often(saved: Saved, directory: Path, resets: int, whole: int) -> None:
    """Reset again and again; each guest runs for a moment, and is as in the snapshot before that."""
    rng = random.Random(resets)
    command = saved.command(serial=directory / "serial-{n}")
    async with nothing_left(directory):
        async with Pool(saved.path, command, 3, directory=directory / "monitors") as pool:
            guest = await pool.take(paused=True)
            numbers = set()
            for reset in range(1, resets + 1):
                assert guest.number not in numbers
                numbers.add(guest.number)
                await assert_as_saved(guest, saved, None if reset % (resets // whole) == 0 else rng)
                await guest.run()
                old = guest
                guest = await pool.reset(guest, paused=True)
                assert not is_alive(old.pid)
                assert not old.qmp.exists()
                (directory / f"serial-{old.number}").unlink()
            assert len(pool.taken) == 1
        assert not is_alive(guest.pid)
    assert not (directory / "monitors").exists()


def test_guests_of_a_hundred_resets_are_as_in_the_snapshot(saved: Saved, tmp_path: Path) -> None:
    asyncio.run(reset_often(saved, tmp_path, 100, 5))


@pytest.mark.long
def test_guests_of_two_thousand_resets_are_as_in_the_snapshot(saved: Saved, tmp_path: Path) -> None:
    asyncio.run(reset_often(saved, tmp_path, 2000, 20))


def test_taken_guest_goes_on_where_it_was_saved(
    saved: Saved, command: list[str], tmp_path: Path
) -> None:
    async def run() -> None:
        async with (
            nothing_left(tmp_path),
            Pool(saved.path, command, 1, directory=tmp_path) as pool,
            await pool.take() as guest,
        ):
            assert guest.run_state == "running"
            await goes_on(saved, guest.vm, tmp_path / f"serial-{guest.number}")
            assert guest.qmp == tmp_path / f"{guest.number}.qmp"
            async with await Monitor.connect(guest.qmp) as monitor:
                assert (await monitor.execute("query-status"))["status"] == "paused"

    asyncio.run(run())


def test_more_guests_than_are_ready_are_started(
    saved: Saved, command: list[str], tmp_path: Path
) -> None:
    async def run() -> None:
        async with Pool(saved.path, command, 1, directory=tmp_path) as pool:
            guests = await asyncio.gather(*(pool.take() for _ in range(4)))
            assert len({guest.number for guest in guests}) == 4
            assert len({guest.pid for guest in guests}) == 4
            assert {guest.number for guest in pool.taken} == {guest.number for guest in guests}

    asyncio.run(run())


def test_cancelled_take_loses_no_guest(saved: Saved, command: list[str], tmp_path: Path) -> None:
    async def run() -> None:
        async with nothing_left(tmp_path), Pool(saved.path, command, 1, directory=tmp_path) as pool:
            for delay in (0, 0.001, 0.01, 0.05):
                takes = [asyncio.create_task(pool.take()) for _ in range(3)]
                await asyncio.sleep(delay)
                for task in takes:
                    task.cancel()
                results = await asyncio.gather(*takes, return_exceptions=True)
                taken = [guest for guest in results if isinstance(guest, PooledGuest)]
                assert {guest.number for guest in pool.taken} == {guest.number for guest in taken}
                await asyncio.gather(*(guest.end() for guest in taken))

    asyncio.run(run())


def test_ready_guest_that_was_killed_is_never_handed_over(
    saved: Saved, command: list[str], tmp_path: Path
) -> None:
    async def run() -> None:
        async with nothing_left(tmp_path), Pool(saved.path, command, 2, directory=tmp_path) as pool:
            for paused in (True, False):
                while len(pool.ready) < 2:
                    await asyncio.sleep(0.01)
                killed = pool.ready[0]
                os.kill(killed.pid, signal.SIGKILL)
                until(lambda: killed.process.poll() is not None, "it lives")  # noqa: B023
                guest = await pool.take(paused=paused)
                assert guest.number != killed.number
                assert is_alive(guest.pid)

    asyncio.run(run())


def test_cancelled_reset_ends_the_guest_and_loses_no_other(
    saved: Saved, command: list[str], tmp_path: Path
) -> None:
    async def run() -> None:
        async with nothing_left(tmp_path), Pool(saved.path, command, 1, directory=tmp_path) as pool:
            for delay in (0, 0.001, 0.01, 0.05):
                guest = await pool.take()
                reset = asyncio.create_task(pool.reset(guest))
                await asyncio.sleep(delay)
                reset.cancel()
                results = await asyncio.gather(reset, return_exceptions=True)
                taken = [new.number for new in results if isinstance(new, PooledGuest)]
                assert [new.number for new in pool.taken if new is not guest] == taken
                await guest.wait()
                await asyncio.gather(*(new.end() for new in pool.taken))

    asyncio.run(run())


def test_guest_that_has_ended_by_itself_can_be_reset(
    saved: Saved, command: list[str], tmp_path: Path
) -> None:
    async def run() -> None:
        async with Pool(saved.path, command, 1, directory=tmp_path) as pool:
            guest = await pool.take()
            async with await Monitor.connect(guest.qmp) as monitor:
                await monitor.execute("quit")
            assert await guest.wait() == 0
            await guest.end()
            assert pool.taken == ()
            assert (await pool.reset(guest)).number != guest.number

    asyncio.run(run())


def test_guest_that_was_killed_leaves_no_socket(saved: Saved, tmp_path: Path) -> None:
    serial = f"unix:{tmp_path}/{{n}}.serial,server=on,wait=off"
    command = [*saved.command(serial=tmp_path / "unused")[:-1], serial]

    async def run() -> None:
        async with Pool(saved.path, command, 1, directory=tmp_path) as pool:
            guest = await pool.take()
            sockets = [guest.qmp, Path(guest.listeners[0].path)]
            assert sockets[1] == tmp_path / f"{guest.number}.serial"
            assert all(path.is_socket() for path in sockets)
            os.kill(guest.pid, signal.SIGKILL)
            assert await guest.wait() == -signal.SIGKILL
            await guest.end()
            assert not any(path.exists() for path in sockets)

    asyncio.run(run())


def test_guest_that_does_not_answer_is_killed(
    saved: Saved, command: list[str], tmp_path: Path
) -> None:
    async def run() -> None:
        async with nothing_left(tmp_path), Pool(saved.path, command, 1, directory=tmp_path) as pool:
            guest = await pool.take()
            os.kill(guest.pid, signal.SIGSTOP)
            await guest.end()
            assert await guest.wait() == -signal.SIGKILL

    asyncio.run(run())


def test_take_beyond_the_limit_is_refused_until_a_guest_ends(
    saved: Saved, command: list[str], tmp_path: Path
) -> None:
    async def run() -> None:
        async with Pool(saved.path, command, 1, limit=1, directory=tmp_path) as pool:
            guest = await pool.take()
            with pytest.raises(TargetError, match="1 guests of the pool are in use"):
                await pool.take()
            guest = await pool.reset(guest)
            await guest.end()
            await pool.take()

    asyncio.run(run())


def test_guest_of_a_paused_pool_runs_when_it_is_asked_to(
    saved: Saved, command: list[str], tmp_path: Path
) -> None:
    async def run() -> None:
        async with Pool(saved.path, [*command, "-S"], 2, directory=tmp_path) as pool:
            assert not pool.runs
            for paused, state in ((None, "paused"), (True, "paused"), (False, "running")):
                guest = await pool.take(paused=paused)
                answer = await guest.monitor.execute("query-status")
                assert answer["status"] == guest.run_state == state

    asyncio.run(run())


def test_guest_that_was_saved_paused_is_handed_over_paused(
    module_disk: Path, tmp_path: Path
) -> None:
    directory = module_disk / "paused"
    directory.mkdir()
    saved = save_guest(directory, MICROVM, ("microvm.ram",), paused=True)
    command = saved.command(serial=tmp_path / "serial-{n}")

    async def run() -> None:
        async with Pool(saved.path, command, 1, directory=tmp_path) as pool:
            assert (await pool.take()).run_state == "paused"

    asyncio.run(run())


def test_start_that_fails_is_reported_and_tried_again(saved: Saved, tmp_path: Path) -> None:
    place = tmp_path / "serials"
    place.mkdir()
    command = saved.command(serial=place / "serial-{n}")

    async def run() -> None:
        async with Pool(saved.path, command, 1, directory=tmp_path / "run") as pool:
            place.rename(tmp_path / "moved")
            await (await pool.take()).end()
            while pool.starting:
                await asyncio.sleep(0.01)
            with pytest.raises(QemuError, match="No such file or directory"):
                await pool.take()
            assert pool.taken == ()
            while pool.starting:
                await asyncio.sleep(0.01)
            (tmp_path / "moved").rename(place)
            assert (await pool.take()).run_state == "running"
            assert pool.last_error is None

    asyncio.run(run())


def test_pool_whose_guests_do_not_start_leaves_nothing(saved: Saved, tmp_path: Path) -> None:
    command = saved.command(serial=tmp_path / "missing" / "{n}")

    async def run() -> None:
        async with nothing_left(tmp_path):
            with pytest.raises(QemuError, match="No such file or directory"):
                async with Pool(saved.path, command, 2, directory=tmp_path / "run"):
                    raise AssertionError("it was entered")

    asyncio.run(run())
    assert not (tmp_path / "run").exists()


def test_sockets_of_a_pool_that_was_killed_are_removed_and_no_others(
    saved: Saved, command: list[str], tmp_path: Path
) -> None:
    names = ("7.qmp", "07.qmp", "guest.qmp", "8.qmp")
    holders = [socket.socket(socket.AF_UNIX) for _ in names]
    for holder, name in zip(holders, names, strict=True):
        holder.bind(str(tmp_path / name))
    holders[-1].listen()
    (tmp_path / "9.qmp").write_text("mine")

    async def run() -> None:
        async with Pool(saved.path, command, 1, directory=tmp_path):
            found = {path.name for path in tmp_path.glob("*.qmp")}
            assert found == {"1.qmp", "07.qmp", "guest.qmp", "8.qmp", "9.qmp"}

    asyncio.run(run())
    for holder in holders:
        holder.close()


def test_file_that_guests_would_share_is_refused(saved: Saved, tmp_path: Path) -> None:
    command = saved.command(serial=tmp_path / "serial")

    async def run() -> None:
        async with Pool(saved.path, command, 1, directory=tmp_path):
            raise AssertionError("it was entered")

    with pytest.raises(UsageError, match="guests 1 and 2 would both write to"):
        asyncio.run(run())


def test_cancelled_start_of_a_pool_leaves_nothing(
    saved: Saved, command: list[str], tmp_path: Path
) -> None:
    async def enter() -> None:
        async with Pool(saved.path, command, 4, directory=tmp_path / "run"):
            raise AssertionError("it was entered")

    async def run() -> None:
        async with nothing_left(tmp_path):
            for delay in (0.0, 0.01, 0.05, 0.1):
                task = asyncio.create_task(enter())
                await asyncio.sleep(delay)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["load", "lazy"])
def test_guests_of_another_mode_have_the_same_memory(
    saved: Saved, command: list[str], tmp_path: Path, mode: str
) -> None:
    async def run() -> None:
        async with (
            nothing_left(tmp_path),
            Pool(saved.path, command, 2, mode=mode, directory=tmp_path) as pool,
        ):
            guest = await pool.take(paused=True)
            for _ in range(3):
                assert guest.report.mode == mode
                if guest.vm.lazy is not None:
                    await guest.vm.lazy.completed()
                await assert_as_saved(guest, saved, None)
                guest = await pool.reset(guest, paused=True)
            await guest.run()

    asyncio.run(run())
