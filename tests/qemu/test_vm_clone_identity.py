"""What clones have of their own: their number of ``vmgenid``, and the MAC after a reset."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyqmigrate import vm
from pyqmigrate.vm.incoming.clone import clone
from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.incoming.restore import restore
from tests.harness.bare import BareQemu
from tests.harness.locks import HOLD
from tests.harness.machine import BINARY
from tests.harness.saved import memory_of

pytestmark = pytest.mark.qemu

NUMBER = uuid.UUID("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87")
MACHINE = ["-M", "pc", "-m", "16", "-device", f"vmgenid,guid={NUMBER}"]
NET = ["-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile=,mac=52:54:00:00:00:0"]


@dataclass(frozen=True)
class Booted:
    """A guest whose firmware has placed the number at ``address`` of its RAM."""

    path: Path
    address: int

    def command(self, mac: str) -> list[str]:
        before = [BINARY, "-accel", "tcg", "-nodefaults", "-display", "none"]
        return [*before, *MACHINE, *NET[:-1], NET[-1] + mac]

    async def seen(self, guest: RestoredVm) -> uuid.UUID:
        """The number as the guest reads it."""
        memory = await memory_of(guest.monitor, guest.process.pid)
        return uuid.UUID(bytes_le=memory["pc.ram"][self.address : self.address + 16])


@pytest.fixture(scope="module")
def booted(module_disk: Path) -> Iterator[Booted]:
    with BareQemu(*MACHINE, *NET[:-1], NET[-1] + "1", run=True) as qemu:

        async def place(monitor: vm.Monitor) -> int:
            deadline = time.monotonic() + 60
            while True:
                memory = (await memory_of(monitor, qemu.process.pid))["pc.ram"]
                if (address := memory.find(NUMBER.bytes_le)) >= 0:
                    return address
                assert time.monotonic() < deadline, "the firmware does not place the number"
                await asyncio.sleep(0.1)

        address = qemu.run(place)
        path = module_disk / "guest.mapped"
        asyncio.run(vm.connect(qemu.socket).save(path, then="quit"))
        yield Booted(path, address)


def test_each_clone_gets_another_number(booted: Booted, tmp_path: Path) -> None:
    directory = tmp_path / "not" / "there"

    async def run() -> set[uuid.UUID]:
        clones = await clone(booted.path, booted.command("1"), 2, directory=directory, paused=True)
        guests = [one.vm for one in clones if one.vm is not None]
        try:
            assert len(guests) == 2, clones
            assert {path.name for path in directory.iterdir()} == {"1.qmp", "2.qmp"}
            for guest in guests:
                asked = await guest.monitor.execute("query-vm-generation-id")
                assert await booted.seen(guest) == uuid.UUID(asked["guid"])
                assert any("guid=auto" in note for note in guest.report.notes)
                assert any("the same UUID, MAC addresses" in note for note in guest.report.notes)
            return {await booted.seen(guest) for guest in guests}
        finally:
            for guest in guests:
                await guest.end()

    numbers = asyncio.run(run())
    assert len(numbers) == 2
    assert NUMBER not in numbers


def test_restored_guest_gets_a_new_number_and_no_note_on_shared_identity(booted: Booted) -> None:
    async def run() -> None:
        first = await restore(booted.path, booted.command("1"), paused=True)
        try:
            assert await booted.seen(first) != NUMBER
            assert not any("the same UUID" in note for note in first.report.notes)
        finally:
            await first.end()

    asyncio.run(run())


def test_restore_beside_another_process_that_maps_the_snapshot_says_what_both_share(
    booted: Booted,
) -> None:
    async def run() -> tuple[str, ...]:
        guest = await restore(booted.path, booted.command("1"), paused=True)
        await guest.end()
        return guest.report.notes

    holding = [sys.executable, "-c", HOLD, str(booted.path)]
    with subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        notes = asyncio.run(run())
        process.communicate()
    assert sum("the same UUID" in note for note in notes) == 1


def test_mac_of_the_command_line_is_the_devices_after_a_reset(
    booted: Booted, tmp_path: Path
) -> None:
    """What docs/vm.md says: the loaded state has the old one."""

    async def mac(guest: RestoredVm) -> str:
        return str((await guest.monitor.execute("query-rx-filter"))[0]["main-mac"])

    async def run() -> None:
        command = booted.command("{n}")
        clones = await clone(booted.path, command, 2, directory=tmp_path, paused=True)
        guests = [one.vm for one in clones if one.vm is not None]
        try:
            assert [await mac(guest) for guest in guests] == ["52:54:00:00:00:01"] * 2
            await guests[1].monitor.execute("system_reset")
            await guests[1].monitor.execute("cont")
            while await mac(guests[1]) != "52:54:00:00:00:02":
                await asyncio.sleep(0.01)
        finally:
            for guest in guests:
                await guest.end()

    asyncio.run(asyncio.wait_for(run(), 60))
