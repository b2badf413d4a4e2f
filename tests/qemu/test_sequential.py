"""Sequential streams between QEMU and us: it saves and we load, we save and it loads."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyqmigrate import RamBlock
from pyqmigrate.errors import NotSupported
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.snapshot.load.sequential import (
    SequentialLoadReport,
    SequentialReader,
    start_sequential_load,
)
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.snapshot.save.sequential import SequentialWriter, start_sequential_save
from pyqmigrate.snapshot.save.writer import SaveOptions
from tests.harness.compare_memory import assert_same_blocks, assert_same_memory
from tests.harness.contents import Contents, fill
from tests.harness.machine import RAM_BLOCK, GuestRam, MigrationFailed, Mode
from tests.harness.pattern_guest import build, check_pattern
from tests.harness.sequential_saves import SequentialQemu
from tests.harness.version import qemu_version

pytestmark = pytest.mark.qemu

RAM = 48 << 20
LIVE_RAM = 24 << 20
PAGE = 4096
KNOWS_SWITCHOVER = qemu_version() >= (10, 0)  # the command switchover-start


@dataclass(frozen=True)
class Loaded:
    report: SequentialLoadReport
    blocks: dict[str, bytearray]


def load(path: Path, *, offset: int = 0) -> Loaded:
    """All blocks of a sequential stream, into memory that was not zero."""
    source = StreamFile.open(f"file:{path},offset={offset}")
    try:
        reader = SequentialReader(source, {}, skip_unknown_blocks=True)
        reader.close()
        blocks = {block.name: bytearray(b"\x77") * block.length for block in reader.blocks}
        return Loaded(start_sequential_load(source, blocks).wait(), blocks)
    finally:
        source.close()


@pytest.mark.parametrize(
    ("machine", "contents"), [*itertools.product(RAM_BLOCK, [Contents.SPECKLED, Contents.RUNS])]
)
def test_we_load_what_qemu_saved(machine: str, contents: Contents, disk: Path) -> None:
    path = disk / "guest.sequential"
    with GuestRam(RAM) as ram, SequentialQemu(ram, machine=machine) as vm:
        fill(memoryview(ram.memory), contents, seed=1)
        vm.save(path)
        loaded = load(path)
        assert_same_memory(loaded.blocks[vm.ram_block], ram.memory)
        assert_same_blocks(loaded.blocks, vm.read_blocks())
        assert loaded.report.stream.machine == vm.machine_name()
    assert loaded.report.stream.complete
    assert loaded.report.devices
    described = loaded.report.stream.description
    assert described is not None
    names = [(d["name"], d["instance_id"]) for d in described["devices"]]
    assert [(d.name, d.instance_id) for d in loaded.report.devices] == names


@pytest.mark.parametrize("offset", [0x1234, 1 << 20])
def test_offset_is_understood_both_ways(offset: int, disk: Path) -> None:
    path = disk / "guest.sequential"
    with GuestRam(RAM) as ram, SequentialQemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED, seed=2)
        vm.save(path, offset=offset)
        assert_same_memory(load(path, offset=offset).blocks["pc.ram"], ram.memory)
        memory = bytearray(ram.memory)
    save_ours(path, memory, offset=offset)
    assert_qemu_loads(path, memory, offset=offset)


def save_ours(path: Path, memory: bytearray, *, machine: str = "", offset: int = 0) -> None:
    start_sequential_save(
        f"file:{path},offset={offset}", [RamBlock("pc.ram", memory)], machine=machine
    ).wait()


def assert_qemu_loads(
    path: Path, memory: bytearray, *, machine: str = "pc", offset: int = 0
) -> None:
    with GuestRam(len(memory)) as ram, SequentialQemu(ram, machine=machine, incoming=True) as vm:
        ram.memory[:] = b"\x66" * len(memory)
        vm.load(path, offset=offset)
        assert_same_memory(ram.memory, memory)


@pytest.fixture
def memory() -> bytearray:
    memory = bytearray(RAM)
    fill(memoryview(memory), Contents.SPECKLED, seed=4)
    return memory


@pytest.mark.parametrize("contents", [Contents.SPECKLED, Contents.RUNS])
def test_qemu_loads_what_we_saved_over_memory_that_was_not_zero(
    contents: Contents, disk: Path
) -> None:
    memory = bytearray(RAM)
    fill(memoryview(memory), contents, seed=3)
    path = disk / "ours.sequential"
    save_ours(path, memory)
    assert_qemu_loads(path, memory)


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_machine_name_of_the_loading_qemu_is_accepted(
    machine: str, memory: bytearray, disk: Path
) -> None:
    with GuestRam(RAM) as ram, SequentialQemu(ram, machine=machine) as vm:
        name = vm.machine_name()
    save_ours(disk / "ours", memory, machine=name)
    assert_qemu_loads(disk / "ours", memory, machine=machine)


def test_other_machine_s_stream_is_refused_by_qemu(memory: bytearray, disk: Path) -> None:
    save_ours(disk / "ours", memory, machine="pc-q35-9.0")
    with pytest.raises(MigrationFailed):
        assert_qemu_loads(disk / "ours", memory)


def test_qemu_loads_a_save_with_rewritten_pages(memory: bytearray, disk: Path) -> None:
    path = disk / "ours.sequential"
    writer = SequentialWriter(path, [RamBlock("pc.ram", memory)])
    writer.begin()
    writer.write_pages()
    pages = np.frombuffer(memory, dtype=np.uint8).reshape(-1, PAGE)
    rng = np.random.default_rng(5)
    for _ in range(3):
        dirty = Bitmap(len(pages))
        for k in rng.integers(0, len(pages), 300).tolist():
            pages[k] = rng.integers(0, 3) * 0x11
            dirty.core[k // 64] |= 1 << k % 64
        writer.write_pages([dirty])
    writer.finish(switchover_start=KNOWS_SWITCHOVER)
    writer.close()
    del pages
    assert_qemu_loads(path, memory)


def test_blocks_and_devices_of_qemu_go_through_us_back_to_qemu(disk: Path) -> None:
    """Loaded, then saved again with the device sections as they were: QEMU goes on with it."""
    first, second = disk / "theirs", disk / "ours"
    with GuestRam(RAM) as ram, SequentialQemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED, seed=6)
        vm.save(first)
        blocks = vm.read_blocks()
        loaded = load(first)
    data, stream = first.read_bytes(), loaded.report.stream
    sections = b"".join(
        data[s.offset : s.offset + s.length] for s in stream.sections if s.kind.name == "FULL"
    )
    assert stream.description_offset is not None
    writer = SequentialWriter(
        second,
        [RamBlock(b.name, loaded.blocks[b.name]) for b in stream.blocks],
        SaveOptions(machine=stream.machine),
    )
    writer.begin()
    writer.write_pages()
    description = data[stream.description_offset + 5 : stream.end]
    writer.finish(sections, description, switchover_start=KNOWS_SWITCHOVER)
    writer.close()
    with GuestRam(RAM) as ram, SequentialQemu(ram, incoming=True) as vm:
        vm.load(second)
        assert_same_blocks(vm.read_blocks(), blocks)
    again = load(second)
    assert again.report.devices == loaded.report.devices


@dataclass(frozen=True)
class Live:
    path: Path
    ram: bytes
    result: dict[str, Any]


def save_live(machine: str, directory: Path, *, xbzrle: bool) -> Live:
    path, serial = directory / "guest.sequential", directory / "serial"
    image = build(directory, LIVE_RAM)
    with (
        GuestRam(LIVE_RAM) as ram,
        SequentialQemu(ram, machine=machine, run=True, bios=image, serial=serial) as vm,
    ):
        vm.xbzrle = xbzrle
        deadline = time.monotonic() + 60
        while len(serial.read_bytes()) < 2:
            assert time.monotonic() < deadline, "the guest does not run"
            time.sleep(0.01)
        result = vm.save_in_rounds(path, 4)
        return Live(path, ram.memory[:], result)


@pytest.mark.parametrize("xbzrle", [False, True], ids=["pages", "xbzrle"])
@pytest.mark.parametrize("machine", RAM_BLOCK)
def test_live_stream_is_one_instant_of_the_guest(machine: str, xbzrle: bool, disk: Path) -> None:
    live = save_live(machine, disk, xbzrle=xbzrle)
    loaded = load(live.path)
    memory = loaded.blocks[RAM_BLOCK[machine]]
    check_pattern(bytes(memory))
    assert_same_memory(memory, live.ram)
    saved_again = live.result["ram"]["normal"] + live.result["ram"]["duplicate"]
    assert saved_again > LIVE_RAM // PAGE, "no page was saved twice: the test proves nothing"
    if xbzrle:
        assert live.result["xbzrle-cache"]["pages"] > 0, "no change was written"


def test_snapshot_says_that_a_sequential_stream_is_another_kind(disk: Path) -> None:
    with GuestRam(RAM) as ram, SequentialQemu(ram) as vm:
        vm.save(disk / "guest", Mode())
    with pytest.raises(NotSupported, match="sequential"):
        MappedRamSnapshot(StreamFile.open(disk / "guest"))
