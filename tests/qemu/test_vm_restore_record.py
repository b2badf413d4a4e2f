"""A restore by the record of a save, and one with a command line that is held against it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyqmigrate.errors import SnapshotError, UsageError
from pyqmigrate.vm.incoming.clone import clone
from pyqmigrate.vm.incoming.shared_files import written_files
from pyqmigrate.vm.outgoing.save import save
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.record.command import recorded_command
from pyqmigrate.vm.record.contents import read_record, record_path
from tests.harness.bare import BareQemu
from tests.harness.machine import BINARY, GuestRam
from tests.harness.recorded import VM, drive, going_on, image, overlays, restored, saved

pytestmark = pytest.mark.qemu

MIB = 1 << 20


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where monitors are: it stays when QEMU has ended, so that another one can be there."""
    return tmp_path_factory.mktemp("monitor")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The snapshot of a VM that has ended, with its record."""
    directory = tmp_path_factory.mktemp("plain")
    with BareQemu(*VM, "-device", "e1000,id=n0", socket=directory / "qmp") as qemu:
        saved(qemu, directory / "snap", then="quit")
    return directory / "snap"


BARE = [BINARY, "-nodefaults", "-display", "none"]
E1000 = ["-device", "e1000,id=n0"]


def test_command_needs_no_command_line(plain: Path) -> None:
    command = [sys.executable, "-m", "pyqmigrate", "vm", "restore", "--json", str(plain)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            text = ""
            while not text.endswith("\n}\n"):
                line = process.stdout.readline()
                assert line, text
                text += line
            report = json.loads(text)
            assert report["mode"] == "instant"
            assert any(str(record_path(plain)) in note for note in report["notes"])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def test_snapshot_without_a_record_needs_a_command_line(plain: Path, tmp_path: Path) -> None:
    shutil.copyfile(plain, tmp_path / "snap")
    with pytest.raises(UsageError, match=r"has no record.*after --"):
        restored(tmp_path / "snap")
    with pytest.raises(UsageError, match="cannot create overlays"):
        restored(tmp_path / "snap", [*BARE, *VM, *E1000], with_disks=True)
    restored(tmp_path / "snap", [*BARE, *VM, *E1000])


def test_record_of_another_snapshot_is_not_used(plain: Path, tmp_path: Path, place: Path) -> None:
    with BareQemu("-M", "q35", "-m", "16M", socket=place / "qmp") as qemu:
        saved(qemu, tmp_path / "snap")
    shutil.copyfile(plain, tmp_path / "snap")
    with pytest.raises(UsageError, match="is the record of another snapshot"):
        restored(tmp_path / "snap")
    notes = restored(tmp_path / "snap", [*BARE, *VM, *E1000])
    assert any("of another snapshot and is not used" in note for note in notes)


def test_copies_of_snapshot_and_record_belong_together(plain: Path, tmp_path: Path) -> None:
    shutil.copyfile(plain, tmp_path / "snap")
    shutil.copy(record_path(plain), record_path(tmp_path / "snap"))
    restored(tmp_path / "snap")


def test_damaged_record_is_reported_and_can_be_moved_away(plain: Path, tmp_path: Path) -> None:
    shutil.copyfile(plain, tmp_path / "snap")
    record_path(tmp_path / "snap").write_text('{"format": "pyqmigrate vm record", "version": 1}')
    with pytest.raises(SnapshotError, match=r"snap\.vm\.json.*move the record away"):
        restored(tmp_path / "snap", [*BARE, *VM, *E1000])


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (["-M", "q35", *VM[2:], *E1000], "give -machine pc-i440fx-"),
        (["-M", "pc", "-m", "64M", *VM[4:], *E1000], "give -m 32M"),
        (["-M", "pc", "-m", "32M", *E1000], "give -smp 2"),
        ([*VM[:-1], "Opteron_G1", *E1000], "give -cpu qemu64"),
        (VM, "give -device e1000,id=n0"),
    ],
)
def test_other_vm_is_refused_before_qemu_starts(plain: Path, words: list[str], cure: str) -> None:
    with pytest.raises(UsageError, match=cure):
        restored(plain, ["/nonexistent/qemu-system-x86_64", *words])


def test_same_vm_in_other_words_is_restored(plain: Path) -> None:
    machine = read_record(plain).machine.type  # type: ignore[union-attr]
    words = [
        "-machine",
        f"type={machine}",
        "-m",
        "size=32768k",
        "-smp",
        "cores=2,sockets=1",
        "-device",
        '{"driver":"e1000","id":"other"}',
    ]
    assert restored(plain, [*BARE, *words], paused=True) == []


def test_relative_names_are_those_of_the_directory_of_the_vm(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image(tmp_path / "disk")
    relative = ["-drive", "file=disk,format=raw,if=virtio", "-serial", "file:serial"]
    with BareQemu(*VM, *relative, cwd=tmp_path, socket=place / "qmp") as qemu:
        record = saved(qemu, tmp_path / "snap", then="quit")
    (found,) = (each for each in record.disks if each.writable)
    assert found.file == str(tmp_path / "disk") and found.images[0].state is not None
    (tmp_path / "serial").unlink()
    monkeypatch.chdir(place)
    restored(tmp_path / "snap")
    assert (tmp_path / "serial").exists() and not (place / "serial").exists()
    command, _ = recorded_command(record, record_path(tmp_path / "snap"))
    assert {str(tmp_path / "disk"), str(tmp_path / "serial")} <= written_files(command).keys()
    with pytest.raises(UsageError, match=r"guests 1 and 2 would both .* whole command line after"):
        asyncio.run(clone(tmp_path / "snap", None, 2, directory=place))


def test_clones_of_a_recorded_guest_have_their_own_monitors_only(
    tmp_path: Path, place: Path
) -> None:
    other = ["-monitor", f"unix:{place}/hmp,server=on,wait=off"]
    with BareQemu(*VM, *other, socket=place / "qmp") as qemu:
        saved(qemu, tmp_path / "snap", then="quit")

    async def session() -> None:
        for one in await clone(tmp_path / "snap", None, 2, directory=place):
            assert one.vm is not None, one.error
            assert sum("is left out" in note for note in one.vm.report.notes) == 2
            async with one.vm as guest:
                await guest.monitor.execute("query-status")
                await guest.end()

    asyncio.run(session())
    assert not (place / "qmp").exists() and not (place / "hmp").exists()


def test_daemon_is_restored_as_a_child_process(tmp_path: Path, place: Path) -> None:
    image(tmp_path / "disk")
    words = [
        *BARE,
        *VM,
        "-drive",
        "file=disk,format=raw,if=virtio",
        "-daemonize",
        "-pidfile",
        "pid",
        "-qmp",
        f"unix:{place}/qmp,server=on,wait=off",
        "-S",
    ]
    environment = {**os.environ, "PWD": str(tmp_path)}
    subprocess.run(words, cwd=tmp_path, env=environment, check=True, stdin=subprocess.DEVNULL)
    pid = int((tmp_path / "pid").read_text())
    try:
        asyncio.run(save(place / "qmp", tmp_path / "snap", then="quit"))
    finally:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    notes = restored(tmp_path / "snap")
    assert any("-daemonize is left out" in note for note in notes)


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_memory_in_an_unnamed_file_is_restored(tmp_path: Path, place: Path, mode: str) -> None:
    with GuestRam(32 * MIB) as ram:
        memory = [
            "-object",
            f"memory-backend-file,id=m,size=32M,share=on,mem-path=/proc/self/fd/{ram.fd}",
            "-machine",
            "pc,memory-backend=m",
            "-m",
            "32M",
        ]
        with BareQemu(*memory, fds=[ram.fd], socket=place / "qmp") as qemu:
            saved(qemu, tmp_path / "snap", then="quit")
    notes = restored(tmp_path / "snap", mode=mode)
    assert any("gets new memory" in note for note in notes)


def test_descriptor_of_the_saved_qemu_is_named(tmp_path: Path, place: Path) -> None:
    read, write = os.pipe()
    try:
        with BareQemu(
            "-M",
            "pc",
            "-m",
            "32M",
            "-add-fd",
            f"fd={write},set=1",
            fds=[write],
            socket=place / "qmp",
        ) as qemu:
            saved(qemu, tmp_path / "snap", then="quit")
    finally:
        os.close(read)
        os.close(write)
    with pytest.raises(UsageError, match=rf"-add-fd fd={write},set=1\).*after --"):
        restored(tmp_path / "snap")


def test_restored_guest_can_be_saved_and_restored_again(tmp_path: Path, place: Path) -> None:
    """With the memory that a restore mapped, its own monitor, and an overlay by then."""
    image(tmp_path / "disk")
    with BareQemu(*VM, *drive(tmp_path / "disk"), socket=place / "qmp", run=True) as qemu:
        saved(qemu, tmp_path / "first", then="quit")

    async def again() -> None:
        async with going_on(tmp_path / "first", with_disks=True) as guest:
            await save(place / "qmp", tmp_path / "second", then="quit", with_disks=True)
            await guest.wait()

    asyncio.run(again())
    record = read_record(tmp_path / "second")
    assert record is not None
    assert [Path(each.file).name for each in record.disks[0].images] == ["first.d0.qcow2", "disk"]
    restored(tmp_path / "second", with_disks=True)
    assert "second.d0.qcow2" in overlays(tmp_path)


@pytest.mark.parametrize("blockdev", [False, True], ids=["drive", "blockdev"])
def test_disk_that_got_an_overlay_before_the_save_has_it_again(
    tmp_path: Path, place: Path, blockdev: bool
) -> None:
    disk = image(tmp_path / "disk")
    nodes = [
        "-blockdev",
        f"driver=file,filename={disk},node-name=f0",
        "-blockdev",
        "driver=raw,file=f0,node-name=d0",
        "-device",
        "virtio-blk-pci,drive=d0,id=v0",
    ]
    with BareQemu(
        *VM, *(nodes if blockdev else drive(disk)), run=True, socket=place / "qmp"
    ) as qemu:
        saved(qemu, tmp_path / "before", with_disks=True)
        saved(qemu, tmp_path / "snap", then="quit")

    async def session() -> list[str]:
        async with going_on(tmp_path / "snap") as guest:
            return await files(guest.monitor)

    assert asyncio.run(session()) == [str(tmp_path / "disk.before.qcow2")]


async def files(monitor: Monitor) -> list[str]:
    disks = await monitor.execute("query-block")
    return [disk["inserted"]["file"] for disk in disks if "inserted" in disk]


def test_record_costs_a_restore_little(plain: Path) -> None:
    """What is imported for it before QEMU starts is small, and has no event loop."""
    code = (
        "import sys, pyqmigrate.cli, pyqmigrate.cli.vm.restore\n"
        "import pyqmigrate.vm.incoming.qemu_ahead, pyqmigrate.vm.incoming.early_restore\n"
        "from pyqmigrate.vm.incoming.options import DiskOptions\n"
        "from pyqmigrate.vm.incoming.restore_command import choose_command\n"
        "from pyqmigrate.vm.incoming.source import RestoreSource\n"
        "before = {*sys.modules}\n"
        f"source = RestoreSource({str(plain)!r}, None)\n"
        "choose_command(source, None, DiskOptions())\n"
        "print(*({*sys.modules} - before))"
    )
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert "pyqmigrate.vm.record.contents" in loaded
    assert not {"asyncio", "ssl", "hashlib", "qemu.qmp", "datetime"} & loaded
    assert len(loaded) < 25, loaded
