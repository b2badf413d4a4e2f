"""Many guests from one snapshot."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.incoming.clone import Clone, clone
from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.incoming.restore import restore
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.compare_memory import assert_same_blocks
from tests.harness.covering import covering
from tests.harness.saved import RAM, Saved, goes_on, memory_of, save_guest, serial_says

pytestmark = pytest.mark.qemu

MIB = 1 << 20
PC = ["-M", "pc", "-m", str(RAM >> 20)]


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    return save_guest(module_disk, PC)


async def end_all(clones: list[Clone]) -> None:
    for one in clones:
        if one.vm is not None:
            await one.vm.end()


def proportional_bytes(pid: int) -> int:
    """The process's share of all memory that it uses, divided among who uses it too."""
    return memory_use(pid, "Pss")


def changed_bytes(pid: int) -> int:
    """What it has changed and nobody else has: of the guest's memory, and QEMU's own."""
    return memory_use(pid, "Private_Dirty")


def memory_use(pid: int, kind: str) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(rf"^{kind}: +(\d+) kB", text, re.MULTILINE)
    assert found, text
    return int(found[1]) * 1024


def test_every_clone_goes_on_by_itself(saved: Saved, tmp_path: Path) -> None:
    command = saved.command(serial=tmp_path / "serial-{n}")

    async def run() -> None:
        clones = await clone(saved.path, command, 3, directory=tmp_path)
        try:
            assert [one.number for one in clones] == [1, 2, 3]
            for one in clones:
                assert one.vm is not None, one.error
                assert one.vm.report.mode == "instant"
                await goes_on(saved, one.vm, tmp_path / f"serial-{one.number}")
                assert one.qmp == tmp_path / f"{one.number}.qmp"
                async with await Monitor.connect(one.qmp) as monitor:
                    assert (await monitor.execute("query-status"))["status"] == "paused"
        finally:
            await end_all(clones)

    asyncio.run(run())


def test_clone_that_fails_does_not_stop_the_others(saved: Saved, tmp_path: Path) -> None:
    """Its serial port is a file in a directory that is there for two of three."""
    for number in (1, 3):
        (tmp_path / str(number)).mkdir()
    command = saved.command(serial=tmp_path / "{n}" / "serial")

    async def run() -> None:
        clones = await clone(saved.path, command, 3, directory=tmp_path)
        try:
            assert [one.vm is not None for one in clones] == [True, False, True]
            assert "No such file or directory" in str(clones[1].error)
        finally:
            await end_all(clones)

    asyncio.run(run())


def test_disk_that_all_would_write_to_is_refused(saved: Saved, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    command = [*saved.command(serial=tmp_path / "{n}"), "-drive", f"file={disk},if=virtio"]
    with pytest.raises(UsageError, match=r"guests 1 and 2 would both write to .*disk\.img"):
        asyncio.run(clone(saved.path, command, 2, directory=tmp_path))


def test_one_clone_may_have_the_disk(saved: Saved, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(MIB))
    # No device is attached: the machine stays the one that was saved.
    drive = f"file={disk},if=none,id=d,format=raw"
    command = [*saved.command(serial=tmp_path / "{n}"), "-drive", drive]

    async def run() -> None:
        clones = await clone(saved.path, command, 1, directory=tmp_path)
        await end_all(clones)
        assert clones[0].error is None

    asyncio.run(run())


@pytest.mark.parametrize("count", [0, -1])
def test_no_clones_at_all_is_refused(saved: Saved, tmp_path: Path, count: int) -> None:
    with pytest.raises(UsageError, match="count must be"):
        asyncio.run(clone(saved.path, saved.command(serial=tmp_path / "s"), count))


def children() -> set[str]:
    found = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            found |= set(task.read_text().split())
    return found


def test_cancelled_clones_are_all_ended(saved: Saved, tmp_path: Path) -> None:
    command = saved.command(serial=tmp_path / "serial-{n}")

    async def run() -> None:
        task = asyncio.create_task(clone(saved.path, command, 6, directory=tmp_path))
        while not (tmp_path / "3.qmp").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = children()  # those of other tests' fixtures
    asyncio.run(run())
    assert children() <= before


def share_of_memory(directory: Path, ram: int, count: int) -> None:
    """``count`` paused guests whose memory has all been looked at use hardly more than one."""
    arguments = ["-M", "pc", "-m", str(ram >> 20)]
    # Saved paused: old bytes under clear bits would become zero pages of each guest's own.
    saved = save_guest(directory, arguments, ram=ram, paused=True)
    command = saved.command(serial=directory / "serial-{n}")

    async def touch(one: Clone) -> int:
        """Reads all of its memory as the guest would, through its own mapping."""
        assert one.vm is not None, one.error
        memory = await memory_of(one.vm.monitor, one.vm.process.pid)
        assert_same_blocks(memory, saved.memory)
        return one.vm.process.pid

    async def run() -> None:
        alone = await restore(saved.path, command, paused=True)
        base = proportional_bytes(await touch(Clone(0, directory, alone)))
        await alone.end()
        clones = await clone(saved.path, command, count, directory=directory, paused=True)
        try:
            pids = [await touch(one) for one in clones]
            together = sum(map(proportional_bytes, pids))
        finally:
            await end_all(clones)
        assert base > ram // 2, "its memory is not resident: the test proves nothing"
        # What every QEMU has of its own: code that it shares is small, its heap is not.
        assert together < base + count * (40 * MIB), f"{together >> 20} MiB, one: {base >> 20} MiB"

    asyncio.run(run())


@pytest.mark.parametrize("count", covering([3, 10], short=[3]))
def test_clones_that_write_share_what_they_have_not_changed(disk: Path, count: int) -> None:
    """Each writes over the first 32 MiB, again and again; the rest of its memory it only has."""
    ram, written = 256 * MIB, 28 * MIB
    saved = save_guest(disk, ["-M", "pc", "-m", "256"], ram=32 * MIB, paused=True)
    command = saved.command(serial=disk / "serial-{n}")

    async def looked_at(one: RestoredVm) -> int:
        await memory_of(one.monitor, one.process.pid)
        return one.process.pid

    async def run() -> None:
        alone = await restore(saved.path, command, paused=True)
        pid = await looked_at(alone)
        base, own = proportional_bytes(pid), changed_bytes(pid)
        await alone.end()
        clones = await clone(saved.path, command, count, directory=disk)
        try:
            for one in clones:
                assert one.vm is not None, one.error
                await one.vm.monitor.execute("cont")  # it was saved paused
            for one in clones:
                assert one.vm is not None
                # Two reports: all that it writes was written since it goes on.
                await asyncio.to_thread(serial_says, disk / f"serial-{one.number}", 2)
                await one.vm.monitor.execute("stop")
            pids = [await looked_at(one.vm) for one in clones if one.vm is not None]
            together = sum(map(proportional_bytes, pids))
            changes = [changed_bytes(pid) for pid in pids]
        finally:
            await end_all(clones)
        assert base > ram // 2, "its memory is not resident: the test proves nothing"
        assert all(changed > written for changed in changes), "the guests do not write"
        assert together <= base + sum(changes), f"{together >> 20} MiB, one: {base >> 20} MiB"
        # And what each changed is what it wrote, besides QEMU's own.
        assert all(changed < own + written + 24 * MIB for changed in changes), (own, changes)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("count", "mib"), covering([(3, 256), (10, 256), (10, 2048)], short=[(3, 256)])
)
def test_clones_share_their_memory(disk: Path, count: int, mib: int) -> None:
    share_of_memory(disk, mib * MIB, count)


def test_descriptor_that_all_would_use_is_refused(saved: Saved, tmp_path: Path) -> None:
    command = [*saved.command(serial=tmp_path / "{n}"), "-chardev", "socket,id=c,fd=9"]
    with pytest.raises(UsageError, match="guests 1 and 2 would both use descriptor 9 "):
        asyncio.run(clone(saved.path, command, 2, directory=tmp_path))


def on_file(path: Path) -> list[str]:
    return [
        "-M",
        "pc,memory-backend=pc.ram",
        "-m",
        str(RAM >> 20),
        "-object",
        f"memory-backend-file,id=pc.ram,size={RAM},share=on,mem-path={path}",
    ]


def test_memory_file_that_is_mapped_instead_is_harmless(
    saved: Saved, shm: Path, tmp_path: Path
) -> None:
    """The command line that a save by engine direct is made for."""
    command = saved.command(*on_file(shm / "ram"), serial=tmp_path / "serial-{n}")

    async def run() -> None:
        clones = await clone(saved.path, command, 2, directory=tmp_path)
        try:
            assert [one.vm and one.vm.report.mode for one in clones] == ["instant"] * 2
        finally:
            await end_all(clones)

    asyncio.run(run())
    assert not (shm / "ram").exists()


def test_memory_file_that_all_would_be_loaded_into_is_refused(
    saved: Saved, shm: Path, tmp_path: Path
) -> None:
    command = saved.command(*on_file(shm / "ram"), serial=tmp_path / "serial-{n}")
    with pytest.raises(UsageError, match=r"would both write to .*/ram"):
        asyncio.run(clone(saved.path, command, 2, directory=tmp_path, mode="load"))
