"""QEMU writes its device state, we write the pages: one file that QEMU loads.

Two ways to the device state: ``migrate`` with x-ignore-shared, whose guest has its RAM in a shared
file; ``xen-save-devices-state``, whose guest may have any RAM, read from the process.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyqmigrate import FileMemory, open_snapshot
from pyqmigrate.io.memory import Memory
from pyqmigrate.vm.guest.device_state import DeviceState
from tests.harness.compare_memory import assert_same_blocks, assert_same_memory
from tests.harness.contents import Contents, fill
from tests.harness.direct import FOREIGN, DirectQemu, poke
from tests.harness.machine import RAM_BLOCK, GuestRam, Mode
from tests.harness.pattern_guest import build, check_pattern

pytestmark = pytest.mark.qemu

RAM = 48 << 20
LIVE_RAM = 24 << 20
MODES = [Mode(), Mode(channels=2, multifd=True), Mode(channels=2, multifd=True, direct_io=True)]
VRAM = "0000:00:01.0/vga.vram"


@dataclass(frozen=True)
class Setting:
    """A machine, and what it has beside RAM."""

    machine: str
    devices: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.machine}-devices" if self.devices else self.machine


SETTINGS = [*map(Setting, RAM_BLOCK), Setting("q35", tuple(FOREIGN))]


def assert_snapshot_has(path: Path, expected: dict[str, bytes], state: DeviceState) -> None:
    """Read by this package: whole, with these blocks and these devices."""
    with open_snapshot(path) as snapshot:
        snapshot.verify()
        blocks = {name: bytearray(block.length) for name, block in snapshot.blocks.items()}
        snapshot.load(blocks)
        assert_same_blocks(blocks, expected)
        assert snapshot.stream.capabilities == ("mapped-ram",)
        full = [s for s in snapshot.stream.sections if s.kind.name == "FULL"]
        assert [(s.name, s.instance_id) for s in full] == [*state.devices]


def assert_qemu_loads(path: Path, expected: dict[str, bytes], setting: Setting) -> None:
    for mode in MODES:
        with (
            GuestRam(RAM) as ram,
            DirectQemu(ram, machine=setting.machine, incoming=True, extra=setting.devices) as vm,
        ):
            assert_same_blocks(vm.is_loaded(path, mode), expected)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_shared_ram_and_migrated_state_make_a_file_that_qemu_loads(
    setting: Setting, disk: Path
) -> None:
    path = disk / "guest.mapped"
    with (
        GuestRam(RAM) as ram,
        DirectQemu(ram, machine=setting.machine, extra=setting.devices) as vm,
    ):
        fill(memoryview(ram.memory), Contents.SPECKLED, seed=1)
        if setting.devices:
            poke(vm, VRAM, 4096, b"on the screen")
        state = vm.migrated_state(disk)
        assert state.external == (vm.ram_block,)
        assert state.machine == vm.machine_name()
        blocks = vm.save_directly(path, state, {vm.ram_block: FileMemory(ram.fd)})
    assert_snapshot_has(path, blocks, state)
    assert_qemu_loads(path, blocks, setting)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_private_ram_and_device_state_make_a_file_that_qemu_loads(
    setting: Setting, disk: Path
) -> None:
    path = disk / "guest.mapped"
    with (
        GuestRam(RAM) as ram,
        DirectQemu(ram, machine=setting.machine, extra=setting.devices, private=True) as vm,
    ):
        content = bytearray(RAM // 2)
        fill(memoryview(content), Contents.SPECKLED, seed=2)
        poke(vm, vm.ram_block, RAM // 4, bytes(content))
        if setting.devices:
            poke(vm, VRAM, 4096, b"on the screen")
        before = vm.execute("query-status")
        state = vm.device_state(disk)
        blocks = vm.save_directly(path, state, vm.process_memories())
        assert vm.execute("query-status") == before
    assert any(blocks[RAM_BLOCK[setting.machine]])
    assert_snapshot_has(path, blocks, state)
    assert_qemu_loads(path, blocks, setting)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_both_ways_carry_the_same_devices(setting: Setting, disk: Path) -> None:
    with (
        GuestRam(RAM) as ram,
        DirectQemu(ram, machine=setting.machine, extra=setting.devices) as vm,
    ):
        by_devices = vm.device_state(disk)
        by_migrate = vm.migrated_state(disk)
    assert by_devices.devices == by_migrate.devices
    assert [*by_devices.blocks.items()] == [*by_migrate.blocks.items()]
    assert len(by_devices.sections) == len(by_migrate.sections)


def memfd_backend(length: int) -> list[str]:
    return [
        "-machine",
        "q35,memory-backend=pc.ram",
        "-m",
        f"{length >> 20}M",
        "-object",
        f"memory-backend-memfd,id=pc.ram,size={length},share=on",
    ]


def test_memfd_that_qemu_wrote_all_the_same_is_distinguished(disk: Path) -> None:
    path = disk / "guest.mapped"
    with GuestRam(RAM) as ram, DirectQemu(ram, machine="q35", memory=memfd_backend(RAM)) as vm:
        poke(vm, "pc.ram", 5 << 20, b"in a memfd")
        state = vm.migrated_state(disk)
        if state.external:
            pytest.skip("this QEMU leaves memfds out of the stream")
        assert len(state.carried["pc.ram"]) == RAM  # type: ignore[arg-type]
        blocks = vm.save_directly(path, state, {})
    assert_snapshot_has(path, blocks, state)
    assert_qemu_loads(path, blocks, Setting("q35"))


def test_memfd_known_to_the_caller_is_not_taken_from_the_stream(disk: Path) -> None:
    path = disk / "guest.mapped"
    with GuestRam(RAM) as ram, DirectQemu(ram, machine="q35", memory=memfd_backend(RAM)) as vm:
        poke(vm, "pc.ram", 5 << 20, b"in a memfd")
        state = vm.migrated_state(disk, elsewhere=("pc.ram",))
        assert state.external == ("pc.ram",)
        memory = vm.process_memories()["pc.ram"]
        blocks = vm.save_directly(path, state, {"pc.ram": memory})
    assert_snapshot_has(path, blocks, state)


def test_memfd_of_a_paused_guest_is_saved_with_device_state(disk: Path) -> None:
    path = disk / "guest.mapped"
    with GuestRam(RAM) as ram, DirectQemu(ram, machine="q35", memory=memfd_backend(RAM)) as vm:
        poke(vm, "pc.ram", 5 << 20, b"in a memfd")
        state = vm.device_state(disk)
        where = next(
            link
            for link in Path(f"/proc/{vm.process.pid}/fd").iterdir()
            if "memory-backend-memfd" in str(link.readlink())
        )
        with where.open("rb") as memfd:
            memories: dict[str, Memory] = {**vm.process_memories()}
            memories["pc.ram"] = FileMemory(memfd.fileno())
            blocks = vm.save_directly(path, state, memories)
    assert_snapshot_has(path, blocks, state)
    assert_qemu_loads(path, blocks, Setting("q35"))


def two_nodes(ram: GuestRam) -> list[str]:
    half = ram.length // 2
    command = ["-machine", "q35", "-m", f"{ram.length >> 20}M"]
    for node, (name, offset) in enumerate((("pc.ram", 0), ("ram1", half))):
        command += [
            "-object",
            f"memory-backend-file,id={name},size={half},offset={offset},share=on,"
            f"mem-path=/proc/self/fd/{ram.fd}",
            "-numa",
            f"node,nodeid={node},memdev={name}",
        ]
    return command


def test_two_nodes_in_one_file_are_two_blocks(disk: Path) -> None:
    path, half = disk / "guest.mapped", RAM // 2
    with (
        GuestRam(RAM) as ram,
        DirectQemu(ram, machine="q35", memory=two_nodes(ram), extra=FOREIGN) as vm,
    ):
        fill(memoryview(ram.memory), Contents.RUNS, seed=3)
        state = vm.migrated_state(disk)
        assert sorted(state.external) == ["pc.ram", "ram1"]
        memories = {"pc.ram": FileMemory(ram.fd), "ram1": FileMemory(ram.fd, half)}
        blocks = vm.save_directly(path, state, memories)
        assert_same_memory(blocks["pc.ram"] + blocks["ram1"], ram.memory)
    assert_snapshot_has(path, blocks, state)
    for mode in MODES:
        with (
            GuestRam(RAM) as ram,
            DirectQemu(
                ram, machine="q35", memory=two_nodes(ram), extra=FOREIGN, incoming=True
            ) as vm,
        ):
            assert_same_blocks(vm.is_loaded(path, mode), blocks)


@pytest.mark.parametrize("stored", ["running", "paused"])
def test_run_state_given_for_a_guest_is_that_of_the_loaded_one(stored: str, disk: Path) -> None:
    path = disk / "guest.mapped"
    with GuestRam(RAM) as ram, DirectQemu(ram, machine="q35", private=True) as vm:
        state = vm.device_state(disk, run_state=stored)
        assert state.run_state == stored
        vm.save_directly(path, state, vm.process_memories())
    with GuestRam(RAM) as ram, DirectQemu(ram, machine="q35", run=True, incoming=True) as vm:
        vm.load(path, MODES[1])
        assert vm.execute("query-status")["status"] == stored


def test_device_state_of_a_paused_guest_records_running(disk: Path) -> None:
    with GuestRam(RAM) as ram, DirectQemu(ram, private=True) as vm:
        assert vm.device_state(disk).run_state == "running"


def reports(serial: Path, more_than: int) -> None:
    """Wait until the guest has reported more often."""
    deadline = time.monotonic() + 60
    while len(serial.read_bytes()) <= more_than:
        assert time.monotonic() < deadline, "the guest does not run"
        time.sleep(0.01)


@pytest.mark.parametrize("machine", RAM_BLOCK)
def test_running_guest_is_saved_at_one_instant_and_both_go_on(machine: str, disk: Path) -> None:
    path, serial, again = disk / "guest.mapped", disk / "serial", disk / "again"
    image = build(disk, LIVE_RAM)
    with (
        GuestRam(LIVE_RAM) as ram,
        DirectQemu(ram, machine=machine, run=True, bios=image, serial=serial) as vm,
    ):
        reports(serial, 1)
        state = vm.migrated_state(disk)
        assert state.run_state == "running"
        blocks = vm.save_directly(path, state, {vm.ram_block: FileMemory(ram.fd)})
        before = len(serial.read_bytes())
        vm.execute("cont")
        reports(serial, before)
        assert vm.execute("query-status")["status"] == "running"
    assert_snapshot_has(path, blocks, state)
    saved = check_pattern(blocks[RAM_BLOCK[machine]])
    with (
        GuestRam(LIVE_RAM) as ram,
        DirectQemu(ram, machine=machine, run=True, incoming=True, bios=image, serial=again) as vm,
    ):
        vm.load(path, MODES[2])
        reports(again, 1)
        vm.execute("stop")
        assert check_pattern(ram.memory[:]).generation > saved.generation


def test_guest_keeps_its_uuid(disk: Path) -> None:
    path, uuid = disk / "guest.mapped", "3c1a7e52-8d5f-4e7e-9f5d-6d1f0a6c1b11"
    with GuestRam(RAM) as ram, DirectQemu(ram, extra=["-uuid", uuid]) as vm:
        vm.set_capabilities({"validate-uuid": True})
        state = vm.migrated_state(disk)
        assert state.uuid == bytes.fromhex(uuid.replace("-", ""))
        vm.save_directly(path, state, {"pc.ram": FileMemory(ram.fd)})
    with open_snapshot(path) as snapshot:
        assert snapshot.stream.uuid == state.uuid
    with GuestRam(RAM) as ram, DirectQemu(ram, incoming=True, extra=["-uuid", uuid]) as vm:
        vm.set_capabilities({"validate-uuid": True})
        vm.load(path, MODES[1])
