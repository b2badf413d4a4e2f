"""We save, QEMU loads: it says completed, and the guest's memory is what we were given."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyqmigrate import Descriptors, FileMemory, RamBlock, open_snapshot, save
from tests.harness.compare_memory import assert_same_blocks, assert_same_memory
from tests.harness.contents import Contents, fill
from tests.harness.machine import GuestRam, MigrationFailed, Mode, Qemu

pytestmark = pytest.mark.qemu

RAM = 72 << 20  # two of the ranges that channels take, and a part
SINGLE = Mode()
MULTIFD = Mode(channels=2, multifd=True)
DIRECT = Mode(channels=2, multifd=True, direct_io=True)
SPARSE = ("auto", "exact", "dense")


@dataclass(frozen=True)
class Ours:
    """A snapshot that we made, and the memory that is in it."""

    path: Path
    memory: bytearray


@pytest.fixture(
    scope="module", params=itertools.product(Contents, SPARSE), ids=lambda p: f"{p[0]}-{p[1]}"
)
def ours(request: pytest.FixtureRequest, module_disk: Path) -> Iterator[Ours]:
    contents, sparse = request.param
    memory = bytearray(RAM)
    fill(memoryview(memory), contents, seed=3)
    path = module_disk / "ours.mapped"
    save(path, [RamBlock("pc.ram", memory)], sparse=sparse, channels=2)
    yield Ours(path, memory)
    path.unlink()


@pytest.mark.parametrize("mode", [SINGLE, MULTIFD, DIRECT], ids=str)
def test_qemu_loads_what_we_saved(ours: Ours, mode: Mode) -> None:
    with GuestRam(RAM) as ram, Qemu(ram, incoming=True) as vm:
        vm.load(ours.path, mode)
        assert_same_memory(ram.memory, ours.memory)


SMALL = 16 << 20


@pytest.fixture(scope="module")
def memory() -> bytearray:
    memory = bytearray(SMALL)
    fill(memoryview(memory), Contents.SPECKLED, seed=4)
    return memory


def assert_qemu_loads(
    path: Path, memory: bytearray, *, machine: str = "pc", mode: Mode = DIRECT, offset: int = 0
) -> None:
    with GuestRam(SMALL) as ram, Qemu(ram, machine=machine, incoming=True) as vm:
        vm.load(path, mode, offset=offset)
        assert_same_memory(ram.memory, memory)


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_machine_name_of_the_loading_qemu_is_accepted(
    machine: str, memory: bytearray, disk: Path
) -> None:
    path = disk / "ours.mapped"
    with GuestRam(SMALL) as ram, Qemu(ram, machine=machine) as vm:
        name = vm.machine_name()
    save(path, [RamBlock("pc.ram", memory)], machine=name)
    assert_qemu_loads(path, memory, machine=machine)


def test_machine_name_of_another_type_is_refused_by_qemu(memory: bytearray, disk: Path) -> None:
    path = disk / "ours.mapped"
    save(path, [RamBlock("pc.ram", memory)], machine="pc-q35-9.1")
    with pytest.raises(MigrationFailed, match="Machine type"):
        assert_qemu_loads(path, memory, machine="pc")


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_empty_machine_name_loads_on_any_machine(
    machine: str, memory: bytearray, disk: Path
) -> None:
    path = disk / "ours.mapped"
    save(path, [RamBlock("pc.ram", memory)])
    assert_qemu_loads(path, memory, machine=machine)


@pytest.mark.parametrize("direct_io", ["on", "off"])
@pytest.mark.parametrize("channels", [1, 8])
def test_our_channels_and_direct_io_leave_no_trace_that_qemu_minds(
    channels: int, direct_io: str, memory: bytearray, disk: Path
) -> None:
    path = disk / "ours.mapped"
    save(path, [RamBlock("pc.ram", memory)], channels=channels, direct_io=direct_io)
    assert_qemu_loads(path, memory)


@pytest.mark.parametrize("offset", [0x1000, 0x1234, 0x180000], ids=hex)
@pytest.mark.parametrize("mode", [SINGLE, DIRECT], ids=str)
def test_stream_at_an_offset_loads_from_that_offset(
    offset: int, mode: Mode, memory: bytearray, disk: Path
) -> None:
    path = disk / "ours.mapped"
    path.write_bytes(b"X" * offset)
    save(f"file:{path},offset={offset:#x}", [RamBlock("pc.ram", memory)])
    with path.open("rb") as file:
        assert file.read(offset) == b"X" * offset
    assert_qemu_loads(path, memory, mode=mode, offset=offset)


def test_save_to_descriptors_loads_through_an_fdset(memory: bytearray, disk: Path) -> None:
    path = disk / "ours.mapped"
    buffered = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
    try:
        save(Descriptors(buffered, direct), [RamBlock("pc.ram", memory)])
    finally:
        os.close(direct)
        os.close(buffered)
    mode = Mode(channels=2, multifd=True, direct_io=True, fdset=True)
    assert_qemu_loads(path, memory, mode=mode)


def test_reused_file_holds_nothing_of_its_former_contents(memory: bytearray, disk: Path) -> None:
    path = disk / "ours.mapped"
    former = bytearray(SMALL)
    fill(memoryview(former), Contents.DENSE, seed=5)
    save(path, [RamBlock("pc.ram", former)])
    save(path, [RamBlock("pc.ram", memory)], reuse=True)
    assert_qemu_loads(path, memory)


def test_memory_of_another_qemu_saved_from_its_file_loads(disk: Path) -> None:
    path = disk / "ours.mapped"
    with GuestRam(SMALL) as source, Qemu(source) as vm:
        fill(memoryview(source.memory), Contents.RUNS, seed=6)
        save(path, [RamBlock(vm.ram_block, FileMemory(source.fd, 0, SMALL))])
        expected = bytearray(source.memory)
    assert_qemu_loads(path, expected)


def test_private_memory_of_qemu_is_filled_too(memory: bytearray, disk: Path) -> None:
    path = disk / "ours.mapped"
    save(path, [RamBlock("pc.ram", memory)])
    with GuestRam(SMALL) as ram, Qemu(ram, incoming=True, private=True) as vm:
        vm.load(path, MULTIFD)
        assert_same_memory(vm.read_blocks()["pc.ram"], memory)


def test_all_blocks_of_one_qemu_come_back_in_another(disk: Path) -> None:
    path = disk / "ours.mapped"
    with GuestRam(SMALL) as ram, Qemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED, seed=7)
        blocks = vm.read_blocks()
    blocks = {name: _scrambled(data) if name != "pc.ram" else data for name, data in blocks.items()}
    save(path, [RamBlock(name, data) for name, data in blocks.items()])
    with GuestRam(SMALL) as ram, Qemu(ram, incoming=True) as vm:
        vm.load(path, DIRECT)
        assert_same_blocks(vm.read_blocks(), blocks)


def test_qemu_saves_the_memory_that_it_loaded_from_this_package(
    memory: bytearray, disk: Path
) -> None:
    ours, theirs = disk / "ours.mapped", disk / "theirs.mapped"
    save(ours, [RamBlock("pc.ram", memory)])
    with GuestRam(SMALL) as ram, Qemu(ram, incoming=True) as vm:
        vm.load(ours, MULTIFD)
        vm.save(theirs, DIRECT)
    with open_snapshot(theirs) as snapshot:
        assert_same_memory(snapshot.blocks["pc.ram"].read(0, SMALL), memory)


def _scrambled(data: bytes) -> bytes:
    """Bytes that only a load can have put there."""
    return bytes(byte ^ 0x5A for byte in data)
