"""Files of QEMU's that are not streams are named; a block device is read as a file is."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import (
    Descriptors,
    NotSupported,
    UsageError,
    convert,
    devices,
    open_snapshot,
    seal,
    verify_seal,
)
from pyqmigrate.vm.incoming.restore import restore
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.bare import BareQemu
from tests.harness.saved import Saved, goes_on, save_guest

pytestmark = pytest.mark.qemu


async def job(monitor: Monitor, command: str, **arguments: Any) -> None:
    await monitor.execute(command, {"job-id": "j", **arguments})
    for _ in range(600):
        [found] = await monitor.execute("query-jobs")
        if found["status"] == "concluded":
            assert "error" not in found, found
            await monitor.execute("job-dismiss", {"id": "j"})
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the job does not end")


def test_disk_with_savevm_state_is_named_with_the_state(disk: Path) -> None:
    path = disk / "disk.qcow2"
    file = {"driver": "file", "filename": str(path)}

    async def fill(monitor: Monitor) -> None:
        await job(monitor, "blockdev-create", options={**file, "size": 0})
        await monitor.execute("blockdev-add", {"node-name": "f", **file})
        qcow2 = {"driver": "qcow2", "file": "f"}
        await job(monitor, "blockdev-create", options={**qcow2, "size": 1 << 20})
        with pytest.raises(NotSupported, match="a qcow2 disk image without the state"):
            open_snapshot(path)
        await monitor.execute("blockdev-add", {"node-name": "d", **qcow2})
        await job(monitor, "snapshot-save", tag="work", vmstate="d", devices=["d"])

    with BareQemu("-m", "16M") as qemu:
        qemu.run(fill)
    with pytest.raises(NotSupported, match=r"\(savevm: 'work'\).*-loadvm work -S"):
        open_snapshot(path)


def test_dump_of_guest_memory_is_named(disk: Path) -> None:
    async def dump(monitor: Monitor) -> None:
        for form in ("elf", "kdump-zlib"):
            arguments = {"paging": False, "protocol": f"file:{disk}/{form}", "format": form}
            await monitor.execute("dump-guest-memory", arguments)

    with BareQemu("-m", "16M") as qemu:
        qemu.run(dump)
    for form, what in (("elf", "an ELF core"), ("kdump-zlib", "a kdump file")):
        with pytest.raises(NotSupported, match=what):
            open_snapshot(disk / form)


@contextlib.contextmanager
def block_device(file: Path, *, tail: int) -> Iterator[Path]:
    """A loop device of the file's bytes, followed by ``tail`` others."""
    volume = file.with_name(f"{file.name}.volume")
    shutil.copyfile(file, volume)
    with volume.open("r+b") as opened:
        opened.truncate(-(-file.stat().st_size // 4096) * 4096)
        opened.seek(0, 2)
        opened.write(b"\xa5" * tail)
    made = subprocess.run(
        ["losetup", "--find", "--show", volume], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device can be made: {made.stderr.strip()}")
    try:
        yield Path(made.stdout.strip())
    finally:
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)
        volume.unlink()


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    return save_guest(module_disk, ("-m", "24M"))


@pytest.fixture(params=["mapped-ram", "stream"])
def named(request: pytest.FixtureRequest, saved: Saved, disk: Path) -> Path:
    if request.param == "mapped-ram":
        return saved.path
    convert(saved.path, disk / "stream", to="stream")
    return disk / "stream"


@pytest.mark.parametrize("by", ["path", "descriptor"])
def test_block_device_is_read_as_the_file_is(named: Path, disk: Path, by: str) -> None:
    with block_device(named, tail=1 << 20) as device, device.open("rb") as opened:
        target = device if by == "path" else Descriptors(opened.fileno())
        with open_snapshot(named) as file, open_snapshot(target) as snapshot:
            snapshot.verify()
            assert snapshot.size == snapshot.allocated > file.size
            assert snapshot.stream == file.stream
            for name, block in file.blocks.items():
                expected = block.read(0, block.length)
                assert snapshot.blocks[name].read(0, block.length) == expected
                memory = bytearray(block.length)
                rest = {n: bytearray(b.length) for n, b in file.blocks.items() if n != name}
                snapshot.load({name: memory, **rest})
                assert memory == expected
        assert devices(target) == devices(named)
        for form in ("mapped-ram", "stream"):
            convert(named, disk / "from-file", to=form)
            convert(target, disk / "from-device", to=form)
            assert (disk / "from-file").read_bytes() == (disk / "from-device").read_bytes()


def test_block_device_has_no_seal_and_no_index(saved: Saved, disk: Path) -> None:
    convert(saved.path, disk / "stream", to="stream")
    with block_device(disk / "stream", tail=0) as device:
        assert verify_seal(device) is None
        with pytest.raises(UsageError, match="block device"):
            seal(device)
        with pytest.raises(UsageError, match="block device"):
            open_snapshot(device, index=disk / "index")
        assert not (disk / "index").exists()


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_guest_goes_on_from_a_block_device(saved: Saved, tmp_path: Path, mode: str) -> None:
    serial = tmp_path / "serial"

    async def run(device: Path) -> None:
        vm = await restore(device, saved.command(serial=serial), mode=mode)
        try:
            assert vm.report.mode == mode
            await goes_on(saved, vm, serial)
        finally:
            await vm.end()

    with block_device(saved.path, tail=1 << 20) as device:
        asyncio.run(run(device))
