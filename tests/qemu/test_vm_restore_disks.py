"""Disks of a restore: those of the snapshot's instant, or none."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.format.qcow2 import encode_overlay
from pyqmigrate.vm.incoming.clone import clone
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.record.contents import read_record
from pyqmigrate.vm.record.disk_identity import look_at_qcow2
from tests.harness.bare import BareQemu
from tests.harness.covering import covering
from tests.harness.machine import BINARY
from tests.harness.recorded import (
    SIZE,
    VM,
    drive,
    going_on,
    image,
    overlays,
    restored,
    saved,
    written,
)
from tests.harness.unpacked import qemu_img

pytestmark = pytest.mark.qemu


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return image(tmp_path / "disk")


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where monitors are: it stays when QEMU has ended, so that another one can be there."""
    return tmp_path_factory.mktemp("monitor")


@pytest.fixture(params=["drive", "blockdev", "hda"])
def quit_vm(request: pytest.FixtureRequest, tmp_path: Path, disk: Path, place: Path) -> Path:
    """The snapshot of a VM with a disk, that has ended."""
    ways = {
        "drive": drive(disk),
        "blockdev": [
            "-blockdev",
            f"driver=file,filename={disk},node-name=f0",
            "-blockdev",
            '{"driver":"raw","file":"f0","node-name":"d0"}',
            "-device",
            "virtio-blk-pci,drive=d0,id=v0",
        ],
        "hda": ["-hda", str(disk)],
    }
    words = [*VM, *ways[request.param], "-pidfile", str(tmp_path / "pid")]
    with BareQemu(*words, run=True, socket=place / "qmp") as qemu:
        saved(qemu, tmp_path / "snap", then="quit")
    return tmp_path / "snap"


@pytest.mark.parametrize("with_disks", [False, True])
def test_temporary_overlay_that_ended_with_its_qemu_is_named(
    tmp_path: Path, disk: Path, place: Path, with_disks: bool
) -> None:
    with BareQemu(*VM, *drive(disk), "-snapshot", run=True, socket=place / "qmp") as qemu:
        qemu.run(written)
        saved(qemu, tmp_path / "snap", then="quit")
    with pytest.raises(UsageError, match="-snapshot and snapshot=on make a temporary file"):
        restored(tmp_path / "snap", with_disks=with_disks)
    assert overlays(tmp_path) == []
    notes = restored(tmp_path / "snap", with_disks=with_disks, disks_as_they_are=True)
    assert any("temporary file" in note for note in notes)


def test_untouched_disk_is_restored_without_a_command_line(quit_vm: Path) -> None:
    notes = restored(quit_vm)
    assert any("the command line is from" in note for note in notes)
    assert any(note.startswith("-pidfile") and "left out" in note for note in notes)
    assert not any(note.startswith("disk") for note in notes)


def test_disk_that_was_written_to_is_refused_unless_it_is_wanted(quit_vm: Path, disk: Path) -> None:
    with disk.open("r+b") as file:
        file.write(b"other")
    with pytest.raises(UsageError, match=r"gone ahead.*disk' was written to .*copy.*as-they-are"):
        restored(quit_vm)
    notes = restored(quit_vm, disks_as_they_are=True)
    assert any("gone ahead" in note for note in notes)


def test_disk_of_another_size_or_gone_is_refused(quit_vm: Path, disk: Path) -> None:
    info = disk.stat()
    with disk.open("r+b") as file:
        file.truncate(SIZE - 512)
    os.utime(disk, ns=(info.st_atime_ns, info.st_mtime_ns))
    with pytest.raises(UsageError, match=f"has {SIZE - 512} bytes, but had {SIZE}"):
        restored(quit_vm)
    disk.unlink()
    with pytest.raises(UsageError, match="no longer exists"):
        restored(quit_vm, disks_as_they_are=False)


def test_new_overlay_is_made_for_the_guest_and_the_disk_stays(quit_vm: Path, disk: Path) -> None:
    before = disk.read_bytes()

    async def session(number: int) -> None:
        async with going_on(quit_vm, with_disks=True) as guest:
            assert len(overlays(quit_vm.parent)) == number
            file = await written(guest.monitor)
            assert Path(file).parent == quit_vm.parent
            assert any(file in note for note in guest.report.notes)
        assert b"\x22" * 512 in Path(file).read_bytes()

    asyncio.run(session(1))
    asyncio.run(session(2))
    assert disk.read_bytes() == before


def test_overlay_is_removed_where_no_guest_comes_of_it(quit_vm: Path) -> None:
    with pytest.raises(PyqmigrateError):
        restored(quit_vm, with_disks=True, mode="postcopy")
    assert overlays(quit_vm.parent) == []


def test_disk_is_not_written_to_by_two_restores(quit_vm: Path) -> None:
    """After the first one it has gone ahead."""

    async def session() -> None:
        async with going_on(quit_vm) as guest:
            await written(guest.monitor)

    asyncio.run(session())
    with pytest.raises(UsageError, match="gone ahead"):
        restored(quit_vm)


@pytest.fixture
def gone_on(tmp_path: Path, disk: Path, place: Path) -> Iterator[tuple[Path, list[str]]]:
    """The snapshot of a guest that goes on in an overlay, and its command line."""
    with BareQemu(*VM, *drive(disk), run=True, socket=place / "original") as qemu:
        saved(qemu, tmp_path / "snap", with_disks=True)
        yield tmp_path / "snap", [BINARY, *VM, "-nodefaults", "-display", "none"]


def make_overlay(path: Path, base: Path, form: str = "raw") -> Path:
    with path.open("wb") as file:
        for offset, data in encode_overlay(SIZE, bytes(base), form):
            file.seek(offset)
            file.write(data)
    return path


def test_base_of_a_guest_that_goes_on_is_not_written_to(
    gone_on: tuple[Path, list[str]], disk: Path
) -> None:
    snapshot, command = gone_on
    line = f"qemu-img create -f qcow2 -b {disk} -F raw {snapshot}.d0.qcow2"
    with pytest.raises(UsageError, match="would corrupt that") as caught:
        restored(snapshot, [*command, *drive(disk)])
    assert line in str(caught.value)


def test_disk_of_a_guest_that_goes_on_is_not_that_of_the_snapshot(
    gone_on: tuple[Path, list[str]], disk: Path
) -> None:
    snapshot, command = gone_on
    ahead = disk.with_name("disk.snap.qcow2")
    with pytest.raises(UsageError, match="where the guest went on") as caught:
        restored(snapshot, [*command, *drive(ahead, "qcow2")])
    assert "qemu-img create" in str(caught.value)


def test_new_overlay_is_taken_and_one_that_was_used_is_not(
    gone_on: tuple[Path, list[str]], disk: Path, tmp_path: Path
) -> None:
    snapshot, command = gone_on
    new = make_overlay(tmp_path / "new.qcow2", disk)
    words = [*command, *drive(new, "qcow2")]

    async def session() -> None:
        async with going_on(snapshot, words) as guest:
            assert not any(note.startswith("disk") for note in guest.report.notes)
            await written(guest.monitor)

    asyncio.run(session())
    with pytest.raises(UsageError, match="has been written to since"):
        restored(snapshot, words)


def test_throw_away_disk_may_be_the_base(gone_on: tuple[Path, list[str]], disk: Path) -> None:
    snapshot, command = gone_on
    restored(snapshot, [*command, *drive(disk), "-snapshot"])


def test_clones_have_overlays_of_their_own_beside_the_guest_that_goes_on(
    gone_on: tuple[Path, list[str]], disk: Path, tmp_path: Path
) -> None:
    snapshot, command = gone_on
    words = [*command, *drive(disk)]
    where = tmp_path / "overlays"
    where.mkdir()

    async def session() -> None:
        for one in await clone(snapshot, words, 2, directory=where, with_disks=True):
            assert one.vm is not None, one.error
            assert Path(await written(one.vm.monitor)).name == f"{one.number}.snap.d0.qcow2"
            await one.vm.end()

    asyncio.run(session())
    assert overlays(where) == ["1.snap.d0.qcow2", "2.snap.d0.qcow2"]
    assert disk.read_bytes() == b"\x11" * SIZE


def test_copy_is_the_disk_when_its_times_are_kept(tmp_path: Path, disk: Path, place: Path) -> None:
    with BareQemu(*VM, *drive(disk), socket=place / "qmp") as qemu:
        saved(qemu, tmp_path / "snap", then="quit")
    copy = tmp_path / "copy"
    shutil.copyfile(disk, copy)
    words = [BINARY, *VM, "-nodefaults", "-display", "none", *drive(copy)]
    assert any("must be a copy" in note for note in restored(tmp_path / "snap", words))
    with copy.open("r+b") as file:
        file.write(b"other")
    with pytest.raises(UsageError, match="it is unknown whether"):
        restored(tmp_path / "snap", words)
    shutil.copyfile(disk, copy)
    shutil.copystat(disk, copy)
    assert not any("copy" in note for note in restored(tmp_path / "snap", words))
    shutil.copyfile(disk, copy)
    disk.touch()  # it has gone ahead, and whether the copy was made before cannot be told
    with pytest.raises(UsageError, match="it is unknown whether"):
        restored(tmp_path / "snap", words)


def test_disk_that_moved_is_known_below_a_new_overlay(
    tmp_path: Path, disk: Path, place: Path
) -> None:
    """As on another host, with the times kept."""
    with BareQemu(*VM, *drive(disk), socket=place / "qmp") as qemu:
        saved(qemu, tmp_path / "snap", then="quit")
    moved = disk.rename(tmp_path / "moved")
    new = make_overlay(tmp_path / "new.qcow2", moved)
    restored(
        tmp_path / "snap", [BINARY, *VM, "-nodefaults", "-display", "none", *drive(new, "qcow2")]
    )


def test_guest_that_goes_on_with_its_disk_is_restored_until_it_writes(
    tmp_path: Path, disk: Path, place: Path
) -> None:
    with BareQemu(*VM, *drive(disk), run=True, socket=place / "qmp") as qemu:
        saved(qemu, tmp_path / "snap")
        qemu.run(written)
    with pytest.raises(UsageError, match="has gone ahead of the snapshot"):
        restored(tmp_path / "snap")


def test_disk_that_is_only_read_does_not_matter(tmp_path: Path, disk: Path, place: Path) -> None:
    cdrom = ["-drive", f"file={disk},format=raw,if=ide,media=cdrom,readonly=on"]
    with BareQemu(*VM, *cdrom, socket=place / "qmp") as qemu:
        saved(qemu, tmp_path / "snap", then="quit")
    with disk.open("r+b") as file:
        file.write(b"other")
    restored(tmp_path / "snap")


@pytest.mark.parametrize("engine", ["qemu", "direct"])
def test_qcow2_that_qemu_closed_after_the_save_is_untouched(
    tmp_path: Path, disk: Path, place: Path, engine: str
) -> None:
    """With lazy refcounts QEMU marks the image as clean when it ends."""
    new = make_overlay(tmp_path / "new.qcow2", disk)
    words = drive(new, "qcow2,lazy-refcounts=on")
    with BareQemu(*VM, *words, run=True, socket=place / "qmp") as qemu:
        qemu.run(written)
        saved(qemu, tmp_path / "snap", then="quit", engine=engine)
    restored(tmp_path / "snap")
    with new.open("r+b") as file:
        times = new.stat()
        file.seek(3 << 16)
        file.write(b"\x81")  # in its L1 table
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UsageError, match="as its tables show"):
        restored(tmp_path / "snap")


@pytest.mark.parametrize("count", covering([4, 20], short=[4]))
def test_saves_with_disks_can_each_be_restored(
    tmp_path: Path, disk: Path, place: Path, count: int
) -> None:
    """Also when the guest has its disk in one file again: the first recipe in docs/vm-record.md."""
    names = [f"a-snapshot-with-a-name-{number}" for number in range(count + 1)]
    with BareQemu(*VM, *drive(disk), run=True, socket=place / "qmp") as qemu:
        for name in names[:count]:
            saved(qemu, tmp_path / name, with_disks=True)
        record = read_record(tmp_path / names[count - 1])
        assert record is not None and len(record.disks[0].images) == count
        assert max(len(name) for name in overlays(tmp_path)) < 50

        async def stream(monitor: Monitor) -> None:
            top = await top_node(monitor)
            await monitor.execute("block-stream", {"job-id": "flatten", "device": top})
            await ended(monitor)

        qemu.run(stream)
        record = saved(qemu, tmp_path / names[count], with_disks=True)
        assert len(record.disks[0].images) == 1
    for number in (count // 3, count - 1, count):
        restored(tmp_path / names[number], with_disks=True)
    with pytest.raises(UsageError, match="would corrupt that"):
        restored(tmp_path / names[count // 3])


async def top_node(monitor: Monitor) -> str:
    disks = [disk for disk in await monitor.execute("query-block") if "inserted" in disk]
    return str(disks[0]["inserted"]["node-name"])


async def ended(monitor: Monitor) -> None:
    """Wait for the block jobs, and complete those that wait for that."""
    while jobs := await monitor.execute("query-block-jobs"):
        for job in jobs:
            if job["ready"] and job["status"] == "ready":
                await monitor.execute("block-job-complete", {"device": job["device"]})
        await asyncio.sleep(0.01)


def test_chain_that_was_committed_is_the_disk_again(
    tmp_path: Path, disk: Path, place: Path
) -> None:
    """The second recipe: the overlays are gone, and so are the disks of the snapshots."""
    with BareQemu(*VM, *drive(disk), run=True, socket=place / "qmp") as qemu:
        for name in ("one", "two"):
            saved(qemu, tmp_path / name, with_disks=True)
        qemu.run(written)

        async def commit(monitor: Monitor) -> None:
            top = await top_node(monitor)
            await monitor.execute("block-commit", {"job-id": "flatten", "device": top})
            await ended(monitor)

        qemu.run(commit)
        for name in overlays(tmp_path):
            (tmp_path / name).unlink()
        record = saved(qemu, tmp_path / "three", then="quit")
    assert [each.file for each in record.disks[0].images] == [str(disk)]
    assert disk.read_bytes()[:512] == b"\x22" * 512
    restored(tmp_path / "three")
    for name in ("one", "two"):
        with pytest.raises(UsageError, match=r"gone ahead|no longer exists"):
            restored(tmp_path / name, with_disks=True)


@pytest.mark.parametrize("way", ["rebase", "commit"])
def test_chain_of_a_guest_that_ended_is_flattened(
    tmp_path: Path, disk: Path, place: Path, way: str
) -> None:
    """The recipes for qemu-img."""
    program, environment = qemu_img()
    with BareQemu(*VM, *drive(disk), run=True, socket=place / "qmp") as qemu:
        for name in ("one", "two"):
            saved(qemu, tmp_path / name, with_disks=True)
        qemu.run(written)
    top = str(tmp_path / "disk.two.qcow2")
    words = ["rebase", "-b", "", top] if way == "rebase" else ["commit", "-b", str(disk), top]
    subprocess.run([program, *words], env=environment, check=True, capture_output=True)
    if way == "rebase":
        assert look_at_qcow2(top).backing is None  # type: ignore[union-attr]
        restored(tmp_path / "one", with_disks=True)
        restored(tmp_path / "two", with_disks=True)
    else:
        assert disk.read_bytes()[:512] == b"\x22" * 512
        with pytest.raises(UsageError, match="gone ahead"):
            restored(tmp_path / "one", with_disks=True)


def test_command_in_a_refusal_makes_the_overlay_that_helps(
    gone_on: tuple[Path, list[str]], disk: Path
) -> None:
    program, environment = qemu_img()
    snapshot, command = gone_on
    with pytest.raises(UsageError) as caught:
        restored(snapshot, [*command, *drive(disk)])
    line = shlex.split(str(caught.value).partition("(")[2].partition(")")[0])
    assert line[0] == "qemu-img"
    subprocess.run([program, *line[1:]], env=environment, check=True, capture_output=True)
    restored(snapshot, [*command, *drive(Path(line[-1]), "qcow2")])


def test_new_overlay_is_a_whole_image(tmp_path: Path, disk: Path) -> None:
    program, environment = qemu_img()
    new = make_overlay(tmp_path / "new.qcow2", disk)
    checked = subprocess.run(
        [program, "check", str(new)], env=environment, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked
    info = subprocess.check_output([program, "info", "--output=json", str(new)], env=environment)
    told = json.loads(info)
    assert (
        told["virtual-size"],
        told["full-backing-filename"],
        told["backing-filename-format"],
    ) == (SIZE, str(disk), "raw")
