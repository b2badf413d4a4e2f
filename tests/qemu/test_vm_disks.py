"""Disk snapshots of a real QEMU at the instant of a memory snapshot, and undoing them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pyqmigrate.errors import NotSupported, QemuError, QemuRefused
from pyqmigrate.vm.guest.disks import DiskPlan
from pyqmigrate.vm.guest.inspect import inspect
from pyqmigrate.vm.outgoing import guardian
from pyqmigrate.vm.outgoing.disk_snapshots import create, stranded, take
from pyqmigrate.vm.outgoing.transaction import run_commands
from pyqmigrate.vm.plan.disks import prepare
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.bare import BareQemu
from tests.harness.version import qemu_version

pytestmark = pytest.mark.qemu

MIB = 1 << 20
SIZE = 8 * MIB
OLD, NEW = b"\x11" * 512, b"\x22" * 512
Task = Callable[[Monitor, DiskPlan], Awaitable[None]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two raw images, ``left`` and ``right``, of OLD."""
    for name in ("left", "right"):
        (tmp_path / name).write_bytes(OLD * (SIZE // len(OLD)))
    return tmp_path


def drives(images: Path) -> list[str]:
    """One in each of the two ways to name a disk; and one read-only."""
    return [
        "-M",
        "pc",
        "-m",
        "32M",
        "-drive",
        f"file={images}/left,format=raw,if=virtio,id=first",
        "-blockdev",
        f"driver=file,filename={images}/right,node-name=file",
        "-blockdev",
        "driver=raw,file=file,node-name=top",
        "-device",
        "virtio-blk,drive=top,id=second",
        "-drive",
        f"file={images}/right,format=raw,if=ide,media=cdrom,readonly=on,file.locking=off",
    ]


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def planned(monitor: Monitor, snapshot: Path) -> DiskPlan:
    with await inspect(monitor) as guest:
        return prepare(guest, snapshot)


async def disk_write(monitor: Monitor, disk: str = "left") -> None:
    """A disk of the guest gets NEW at its start."""
    found = next(
        device
        for device in await monitor.execute("query-block")
        if f"/{disk}" in device["inserted"]["file"] and not device["inserted"]["ro"]
    )
    answer = await monitor.hmp(f'qemu-io -d {found["qdev"]} "write -P 0x22 0 512"')
    assert answer == "", answer  # it says on standard output what it did


async def files(monitor: Monitor) -> list[str]:
    """What the writable disks are now."""
    media = [disk["inserted"] for disk in await monitor.execute("query-block")]
    return [Path(medium["file"]).name for medium in media if not medium["ro"]]


def with_plan(images: Path, task: Task, *, run: bool = False) -> DiskPlan:
    async def session(monitor: Monitor) -> DiskPlan:
        plan = await planned(monitor, images / "guest.snap")
        await task(monitor, plan)
        return plan

    with BareQemu(*drives(images), run=run) as qemu:
        return qemu.run(session)


async def forget(monitor: Monitor, plan: DiskPlan) -> list[str]:
    """Undo the snapshots; what could not be undone."""
    errors: list[str] = []
    journal = {
        "disks": [overlay.journal_entry() for overlay in plan.overlays],
        "record": "",
        "provisional": "",
    }
    await run_commands(monitor, guardian.undo_disks(journal, errors))
    return errors


BASES = ["left", "right"]
OVERLAYS = ["left.guest.snap.qcow2", "right.guest.snap.qcow2"]


def test_preparing_touches_nothing(images: Path) -> None:
    async def task(monitor: Monitor, plan: DiskPlan) -> None:
        assert [overlay.disk.name for overlay in plan.overlays] == [
            "first",
            "/machine/peripheral/second",
        ]
        assert listed(images) == BASES
        assert await files(monitor) == BASES

    with_plan(images, task)


def test_writable_disks_go_on_in_overlays_and_bases_stay(images: Path) -> None:
    async def task(monitor: Monitor, plan: DiskPlan) -> None:
        await take(monitor, plan)
        assert await files(monitor) == OVERLAYS
        for disk in BASES:
            await disk_write(monitor, disk)

    with_plan(images, task)
    for name, overlay in zip(BASES, OVERLAYS, strict=True):
        assert (images / name).read_bytes() == OLD * (SIZE // len(OLD))
        assert NEW in (images / overlay).read_bytes()


async def migrated(monitor: Monitor) -> None:
    await monitor.execute("migrate", {"uri": "exec:cat >/dev/null"})
    while (await monitor.execute("query-status"))["status"] != "postmigrate":
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("migrates", [False, True], ids=["paused", "postmigrate"])
def test_guest_goes_on_after_snapshots_were_taken(images: Path, migrates: bool) -> None:
    async def task(monitor: Monitor, plan: DiskPlan) -> None:
        await (migrated(monitor) if migrates else monitor.execute("stop"))
        await take(monitor, plan)
        await monitor.execute("cont")
        await disk_write(monitor)
        assert (await monitor.execute("query-status"))["status"] == "running"

    with_plan(images, task, run=True)
    assert (images / "left").read_bytes()[:512] == OLD
    assert NEW in (images / OVERLAYS[0]).read_bytes()


@pytest.mark.parametrize("state", ["paused", "running", "after postmigrate", "postmigrate"])
def test_forgetting_brings_writes_back_and_removes_overlays(images: Path, state: str) -> None:
    if state == "postmigrate" and qemu_version() < (10, 0):
        pytest.skip("QEMU before 10.0 has no blockdev-set-active")

    async def task(monitor: Monitor, plan: DiskPlan) -> None:
        await (migrated(monitor) if "post" in state else monitor.execute("stop"))
        await take(monitor, plan)
        if state == "postmigrate":
            await monitor.execute("blockdev-set-active", {"active": True})
            await disk_write(monitor)
            await monitor.execute("blockdev-set-active", {"active": False})
        else:
            if state != "paused":
                await monitor.execute("cont")
            await disk_write(monitor)
        assert await forget(monitor, plan) == []
        assert await files(monitor) == BASES
        assert await monitor.execute("query-jobs") == []

    with_plan(images, task, run=True)
    assert listed(images) == BASES
    assert (images / "left").read_bytes()[:1024] == NEW + OLD


def test_forgetting_what_was_not_taken_does_nothing(images: Path) -> None:
    async def task(monitor: Monitor, plan: DiskPlan) -> None:
        assert await forget(monitor, plan) == []
        assert await files(monitor) == BASES

    with_plan(images, task)


def test_all_or_none(images: Path) -> None:
    """A directory stands where the second overlay would be."""

    async def task(monitor: Monitor, plan: DiskPlan) -> None:
        plan.overlays[1].here.mkdir()
        with pytest.raises(QemuRefused):
            await take(monitor, plan)
        assert not plan.taken
        assert await files(monitor) == BASES

    with_plan(images, task)
    assert listed(images) == ["left", "right", OVERLAYS[1]]


async def nodes_of(monitor: Monitor) -> set[str]:
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    return {str(node["node-name"]) for node in nodes}


def test_overlays_are_created_beforehand_and_only_opened_in_the_pause(images: Path) -> None:
    async def task(monitor: Monitor, plan: DiskPlan) -> None:
        before = await nodes_of(monitor)
        await create(monitor, plan)
        assert listed(images) == sorted([*BASES, *OVERLAYS])
        assert await files(monitor) == BASES
        assert await nodes_of(monitor) == before
        assert await monitor.execute("query-jobs") == []
        created = [overlay.here.stat().st_ino for overlay in plan.overlays]
        await disk_write(monitor)  # the guest still runs
        await take(monitor, plan)
        assert await files(monitor) == OVERLAYS
        assert [overlay.here.stat().st_ino for overlay in plan.overlays] == created
        await disk_write(monitor, "right")

    with_plan(images, task, run=True)
    assert (images / "left").read_bytes()[:512] == NEW
    assert (images / "right").read_bytes()[:512] == OLD


def test_forgetting_overlays_that_were_only_created_removes_them(images: Path) -> None:
    async def task(monitor: Monitor, plan: DiskPlan) -> None:
        await create(monitor, plan)
        assert await forget(monitor, plan) == []
        assert await files(monitor) == BASES

    with_plan(images, task, run=True)
    assert listed(images) == BASES


def test_forgetting_an_unfinished_creation_removes_its_node_and_job(images: Path) -> None:
    async def task(monitor: Monitor, plan: DiskPlan) -> None:
        before = await nodes_of(monitor)
        overlay = plan.overlays[0]
        job, node = guardian.creation_of(overlay.node)
        options = {"driver": "file", "filename": overlay.file, "size": 0}
        await monitor.execute("blockdev-create", {"job-id": job, "options": options})
        while (await monitor.execute("query-jobs"))[0]["status"] != "concluded":
            await asyncio.sleep(0.001)
        await monitor.execute(
            "blockdev-add", {"driver": "file", "node-name": node, "filename": overlay.file}
        )
        assert await forget(monitor, plan) == []
        assert await nodes_of(monitor) == before
        assert await monitor.execute("query-jobs") == []

    with_plan(images, task, run=True)
    assert listed(images) == BASES


def test_disk_that_was_resized_since_is_refused(images: Path) -> None:
    async def task(monitor: Monitor, plan: DiskPlan) -> None:
        await create(monitor, plan)
        await monitor.execute(
            "block_resize", {"node-name": plan.overlays[0].disk.node, "size": 2 * SIZE}
        )
        with pytest.raises(QemuError, match="resized"):
            await take(monitor, plan)
        assert not plan.taken
        assert await forget(monitor, plan) == []

    with_plan(images, task)
    assert listed(images) == BASES


def test_second_snapshot_goes_over_the_first(images: Path) -> None:
    async def task(monitor: Monitor, plan: DiskPlan) -> None:
        await take(monitor, plan)
        second = await planned(monitor, images / "two")
        await take(monitor, second)
        assert (await files(monitor))[0] == "left.two.qcow2"
        assert second.overlays[0].disk.format == "qcow2"
        assert await forget(monitor, second) == []
        assert await files(monitor) == OVERLAYS

    with_plan(images, task)


def test_relative_name_is_one_of_qemus_directory(images: Path) -> None:
    async def session(monitor: Monitor) -> None:
        plan = await planned(monitor, images / "snap")
        await take(monitor, plan)
        assert await forget(monitor, plan) == []

    arguments = ["-M", "pc", "-m", "32M", "-drive", "file=left,format=raw,if=virtio"]
    with BareQemu(*arguments, cwd=images) as qemu:
        qemu.run(session)
    assert listed(images) == BASES


@pytest.mark.parametrize(
    "drive",
    [
        ["-blockdev", "driver=null-co,node-name=n,size=1048576", "-device", "virtio-blk,drive=n"],
        ["-drive", "file=/proc/self/fd/{fd},format=raw,if=virtio"],
    ],
    ids=["no-file", "descriptor"],
)
def test_disk_without_a_place_for_an_overlay_is_refused(images: Path, drive: list[str]) -> None:
    fd = os.open(images / "left", os.O_RDWR)
    arguments = [word.format(fd=fd) for word in drive]

    async def session(monitor: Monitor) -> None:
        with pytest.raises(NotSupported, match="disk"):
            await planned(monitor, images / "snap")

    try:
        with BareQemu("-M", "pc", "-m", "32M", *arguments, fds=[fd]) as qemu:
            qemu.run(session)
    finally:
        os.close(fd)


def test_overlay_never_takes_a_name_that_is_taken(images: Path) -> None:
    (images / OVERLAYS[0]).write_text("somebody's")

    async def task(monitor: Monitor, plan: DiskPlan) -> None:
        await take(monitor, plan)
        assert await files(monitor) == ["left.guest.snap.2.qcow2", OVERLAYS[1]]

    with_plan(images, task)
    assert (images / OVERLAYS[0]).read_text() == "somebody's"


def test_guest_without_writable_disks_needs_nothing(images: Path) -> None:
    async def session(monitor: Monitor) -> None:
        plan = await planned(monitor, images / "snap")
        await take(monitor, plan)
        assert await forget(monitor, plan) == []

    with BareQemu("-M", "pc", "-m", "32M") as qemu:
        qemu.run(session)


def test_qemu_that_ended_is_reported(images: Path) -> None:
    async def session(qemu: BareQemu) -> list[str]:
        async with await qemu.connect() as monitor:
            plan = await planned(monitor, images / "guest.snap")
            await take(monitor, plan)
            qemu.kill()
            return stranded(plan)

    with BareQemu(*drives(images)) as qemu:
        left = asyncio.run(session(qemu))
    assert len(left) == 2 and all("when QEMU ended" in sentence for sentence in left)
    assert OVERLAYS[0] in listed(images)
