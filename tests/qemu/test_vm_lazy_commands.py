"""What a guest, its owner and other clients may do while pages of the guest's memory are missing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.errors import QemuError, QemuRefused
from pyqmigrate.vm.incoming.lazy_status import wait_for_memory
from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.incoming.restore import restore
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.compare_memory import assert_same_memory
from tests.harness.lazy_guests import kill_server, server_of
from tests.harness.pools import is_alive
from tests.harness.saved import RAM, Saved, goes_on, memory_of, save_guest, serial_says
from tests.harness.verbs import restored
from tests.harness.version import qemu_version

pytestmark = pytest.mark.qemu

PATIENCE = 60.0
MORE = 16 << 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A guest with room for more memory."""
    memory = ["-m", f"{RAM >> 20}M,slots=2,maxmem=256M"]
    return save_guest(tmp_path_factory.mktemp("q35"), ["-M", "pc", *memory])


@contextlib.asynccontextmanager
async def lazy(saved: Saved, serial: Path, **options: Any) -> AsyncIterator[RestoredVm]:
    """A running guest with most of its pages missing."""
    vm = await restore(
        saved.path, saved.command(serial=serial), mode="lazy", **{"push": "never", **options}
    )
    try:
        yield vm
    finally:
        await vm.end()


async def complete(vm: RestoredVm) -> None:
    """Wait until the guest has all of its memory."""
    assert vm.lazy is not None
    await asyncio.wait_for(vm.lazy.completed(), PATIENCE)


async def until_held(vm: RestoredVm, block: str) -> None:
    """Wait until the restore does not end because of a block that was plugged in."""
    assert vm.lazy is not None
    async with asyncio.timeout(PATIENCE):
        while not vm.lazy.state.warnings:
            await vm.lazy.changed()
    [warning] = vm.lazy.state.warnings
    assert block in warning
    assert "unplug it" in warning
    assert (vm.lazy.state.state, vm.lazy.state.pages_left) == ("running", 0)
    assert (await vm.monitor.execute("query-migrate"))["status"] == "postcopy-active"


def test_devices_can_be_plugged_in(saved: Saved, tmp_path: Path) -> None:
    async def run() -> None:
        async with lazy(saved, tmp_path / "serial", push="idle") as vm:
            await vm.monitor.execute("device_add", {"driver": "virtio-rng-pci", "id": "rng"})
            await vm.monitor.execute("device_del", {"id": "rng"})
            await complete(vm)
            await goes_on(saved, vm, tmp_path / "serial")

    asyncio.run(run())


@pytest.mark.parametrize("kill", [False, True])
def test_guest_with_memory_that_was_plugged_in_keeps_its_server(
    saved: Saved, tmp_path: Path, kill: bool
) -> None:
    """QEMU would leave the guest waiting for zero pages that were never sent; also after a kill."""

    async def run() -> None:
        async with lazy(saved, tmp_path / "serial", push="idle") as vm:
            await vm.monitor.execute(
                "object-add", {"qom-type": "memory-backend-ram", "id": "more", "size": MORE}
            )
            await vm.monitor.execute(
                "device_add", {"driver": "pc-dimm", "id": "dimm", "memdev": "more"}
            )
            if kill:
                kill_server(vm)
            await until_held(vm, "'more'")
            said = await asyncio.to_thread(serial_says, tmp_path / "serial", 3)
            first = len(saved.reports) + 1
            assert said == bytes(number & 0x7F for number in range(first, first + len(said)))

    asyncio.run(run())


def test_restore_ends_when_memory_was_unplugged_again(saved: Saved, tmp_path: Path) -> None:
    rom = tmp_path / "rom"
    rom.write_bytes(b"\x55\xaa" + bytes(4094))

    async def run() -> None:
        command = [*saved.command(serial=tmp_path / "serial"), "-netdev", "user,id=net"]
        command.remove("-no-reboot")
        vm = await restore(saved.path, command, mode="lazy")
        try:
            nic = {"driver": "virtio-net-pci", "id": "nic", "netdev": "net", "romfile": str(rom)}
            await vm.monitor.execute("device_add", nic)
            await until_held(vm, "virtio-net-pci.rom")
            await vm.monitor.execute("device_del", {"id": "nic"})
            await vm.monitor.execute("system_reset")  # without the guest's help, it goes then
            await complete(vm)
            memory = await memory_of(vm.monitor, vm.process.pid)
            assert not any("virtio-net" in name for name in memory)
        finally:
            await vm.end()

    asyncio.run(run())


def test_guest_is_reset_and_begins_anew(saved: Saved, tmp_path: Path) -> None:
    serial = tmp_path / "serial"

    async def run() -> None:
        command = [word for word in saved.command(serial=serial) if word != "-no-reboot"]
        vm = await restore(saved.path, command, mode="lazy", push="idle")
        try:
            await vm.monitor.execute("system_reset", timeout=PATIENCE)
            await complete(vm)
            said = await asyncio.to_thread(serial_says, serial, 2)
            await asyncio.sleep(0.3)
            assert bytes([1, 2]) in serial.read_bytes(), said
        finally:
            await vm.end()

    asyncio.run(run())


def test_dump_has_every_page_or_is_refused(saved: Saved, tmp_path: Path) -> None:
    """QEMU 10 reads all memory for it, which asks for all that is missing; QEMU 11 refuses."""

    async def run() -> None:
        async with lazy(saved, tmp_path / "serial", paused=True) as vm:
            dump = {"paging": False, "protocol": f"file:{tmp_path}/dump"}
            try:
                await vm.monitor.execute("dump-guest-memory", dump, timeout=PATIENCE)
            except QemuRefused as error:
                assert "Dump not allowed during migration" in str(error)
                assert qemu_version() >= (11, 0)
                return
            assert (await vm.monitor.execute("query-migrate"))["status"] == "postcopy-active"

    asyncio.run(run())
    if not (tmp_path / "dump").exists():
        return
    content = (tmp_path / "dump").read_bytes()
    ram = saved.memory["pc.ram"]
    start = content.find(ram[4 << 20 : (4 << 20) + 8192]) - (4 << 20)
    assert start > 0
    # Below 1 MiB the firmware and the holes of a PC are.
    assert_same_memory(content[start + (1 << 20) : start + RAM], ram[1 << 20 :])


@pytest.mark.parametrize("options", [[], ["--live"], ["--method", "background"]], ids=str)
def test_save_of_any_kind_is_refused(saved: Saved, tmp_path: Path, options: list[str]) -> None:
    async def run() -> None:
        async with lazy(saved, tmp_path / "serial", qmp=tmp_path / "qmp") as vm:
            words = ["vm", "save", *options, "--qmp", str(tmp_path / "qmp"), str(tmp_path / "new")]
            done = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "pyqmigrate", *words],
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
            assert done.returncode == 4
            assert "under way" in done.stderr
            assert not (tmp_path / "new").exists()
            # The restore goes on.
            assert (await vm.monitor.execute("query-migrate"))["status"] == "postcopy-active"

    asyncio.run(run())


def test_second_client_stops_and_continues_the_guest(saved: Saved, tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            lazy(saved, tmp_path / "serial", qmp=tmp_path / "qmp", push="idle") as vm,
            await Monitor.connect(tmp_path / "qmp") as second,
        ):
            await second.execute("stop", timeout=PATIENCE)
            assert (await second.execute("query-status"))["status"] == "paused"
            await second.execute("cont", timeout=PATIENCE)
            await complete(vm)
            await goes_on(saved, vm, tmp_path / "serial")

    asyncio.run(run())


def test_guest_whose_keeper_and_server_were_killed_is_resumed_by_hand(
    saved: Saved, tmp_path: Path
) -> None:
    """As docs/lazy.md says: the way out is the page server and migrate-recover."""
    pages = tmp_path / "pages"

    async def run() -> None:
        async with lazy(saved, tmp_path / "serial", paused=True) as vm:
            assert vm.lazy is not None
            server = server_of(vm)
            assert server is not None
            vm.lazy.process.kill()
            with pytest.raises(QemuError, match="keeper"):
                await vm.lazy.completed()
            with pytest.raises(QemuError, match="page-server --resume"):
                await wait_for_memory(vm.process.pid)
            os.kill(server, signal.SIGKILL)
            async with asyncio.timeout(PATIENCE):
                while (await vm.monitor.execute("query-migrate"))["status"] != "postcopy-paused":
                    await asyncio.sleep(0.01)
            await vm.monitor.execute("migrate-recover", {"uri": f"unix:{pages}"})
            words = ["page-server", str(saved.path), "--socket", str(pages), "--resume"]
            done = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "pyqmigrate", *words],
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
            assert done.returncode == 0, done.stderr
            assert (await wait_for_memory(vm.process.pid)).state == "completed"
            memory = await memory_of(vm.monitor, vm.process.pid)
            assert_same_memory(memory["pc.ram"], saved.memory["pc.ram"])
            await vm.monitor.execute("cont")
            await goes_on(saved, vm, tmp_path / "serial")

    asyncio.run(run())


def test_restore_that_is_killed_leaves_a_guest_that_gets_its_memory(
    saved: Saved, tmp_path: Path
) -> None:
    command = saved.command(serial=tmp_path / "serial")
    options = ["--mode", "lazy", "--qmp", str(tmp_path / "qmp")]
    with restored(saved.path, command, *options) as report:
        pid = report["pid"]
        os.kill(parent_of(pid), signal.SIGKILL)
        state = asyncio.run(asyncio.wait_for(wait_for_memory(pid), PATIENCE))
        assert state.pages_left == 0
        assert is_alive(pid)


def parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))
