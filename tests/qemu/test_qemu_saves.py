"""QEMU saves, we load: every byte of every RAM block is what QEMU itself had."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyqmigrate import SnapshotError, open_snapshot
from pyqmigrate.errors import QemuRefused
from tests.harness.compare_memory import assert_same_blocks, assert_same_memory
from tests.harness.contents import Contents, fill
from tests.harness.machine import GuestRam, Mode, Qemu

pytestmark = pytest.mark.qemu

RAM = 48 << 20
ODD_OFFSET = 0x1234
BIG_OFFSET = 0x180000

SINGLE = Mode()
MULTIFD = [Mode(channels=n, multifd=True) for n in (1, 2, 8)]
DIRECT = [Mode(channels=n, multifd=True, direct_io=True) for n in (1, 2, 8)]


@dataclass(frozen=True)
class Case:
    machine: str
    mode: Mode
    offset: int
    contents: Contents
    channels: int  # ours, when loading

    def __str__(self) -> str:
        return f"{self.machine}-{self.mode}-at{self.offset:#x}-{self.contents}-by{self.channels}"


CHOSEN = [
    Case("pc", SINGLE, 0, Contents.SPECKLED, 1),
    Case("q35", SINGLE, ODD_OFFSET, Contents.RUNS, 2),
    Case("pc", MULTIFD[0], ODD_OFFSET, Contents.DENSE, 8),
    Case("q35", MULTIFD[1], 0, Contents.SPECKLED, 1),
    Case("pc", MULTIFD[2], BIG_OFFSET, Contents.RUNS, 2),
    Case("q35", DIRECT[0], BIG_OFFSET, Contents.DENSE, 2),
    Case("pc", DIRECT[1], 0, Contents.RUNS, 8),
    Case("q35", DIRECT[2], ODD_OFFSET, Contents.SPECKLED, 1),
    Case("pc", Mode(2, multifd=True, direct_io=True, fdset=True), 0x1000, Contents.RUNS, 2),
    Case("q35", Mode(2, multifd=True, zero_pages="none"), 0, Contents.RUNS, 2),
    Case("pc", Mode(2, multifd=True, direct_io=True, zero_pages="legacy"), 0, Contents.RUNS, 2),
]
EVERYTHING = [
    Case(
        machine,
        Mode(mode.channels, mode.multifd, mode.direct_io, False, zero_pages),
        offset,
        contents,
        channels,
    )
    for machine, mode, zero_pages, offset, contents, channels in itertools.product(
        ("pc", "q35"),
        [SINGLE, *MULTIFD, *DIRECT],
        ("none", "legacy", "multifd"),
        (0, ODD_OFFSET, BIG_OFFSET),
        Contents,
        (1, 8),
    )
]


def load_all(path: Path, offset: int, channels: int) -> dict[str, bytearray]:
    with open_snapshot(path, offset=offset) as snapshot:
        # Nothing of what a buffer held before may survive.
        blocks = {
            name: bytearray(b"\xa5") * block.length for name, block in snapshot.blocks.items()
        }
        snapshot.load(blocks, channels=channels)
    return blocks


def check(case: Case, path: Path) -> None:
    if case.offset:
        path.write_bytes(b"X" * case.offset)
    with GuestRam(RAM) as ram, Qemu(ram, machine=case.machine) as vm:
        fill(memoryview(ram.memory), case.contents, seed=1)
        vm.save(path, case.mode, offset=case.offset)
        theirs = vm.read_blocks()
        assert_same_memory(theirs[vm.ram_block], ram.memory)
    assert_same_blocks(load_all(path, case.offset, case.channels), theirs)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_every_block_that_qemu_saved_loads_with_equal_bytes(case: Case, disk: Path) -> None:
    check(case, disk / "guest.mapped")


@pytest.mark.long
@pytest.mark.parametrize("case", EVERYTHING, ids=str)
def test_every_block_of_the_whole_matrix_loads_with_equal_bytes(case: Case, disk: Path) -> None:
    check(case, disk / "guest.mapped")


@dataclass(frozen=True)
class Saved:
    """One file by QEMU, and what QEMU knew about it."""

    path: Path
    machine_name: str
    blocks: dict[str, bytes]
    status: dict[str, int]


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Iterator[Saved]:
    path = module_disk / "guest.mapped"
    with GuestRam(RAM) as ram, Qemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED, seed=2)
        status = vm.save(path, Mode(channels=2, multifd=True, direct_io=True))
        yield Saved(path, vm.machine_name(), vm.read_blocks(), status["ram"])


def test_machine_name_is_the_one_qemu_gives_itself(saved: Saved) -> None:
    with open_snapshot(saved.path) as snapshot:
        assert snapshot.machine == saved.machine_name


def test_blocks_have_the_lengths_that_qemu_reports(saved: Saved) -> None:
    with open_snapshot(saved.path) as snapshot:
        lengths = {name: block.length for name, block in snapshot.blocks.items()}
    assert lengths == {name: len(data) for name, data in saved.blocks.items()}


def test_pages_by_kind_are_those_that_qemu_counted(saved: Saved) -> None:
    with open_snapshot(saved.path) as snapshot:
        data = sum(block.data_pages for block in snapshot.blocks.values())
    assert data == saved.status["normal"]


def test_data_pages_are_exactly_the_pages_that_are_not_zero(saved: Saved) -> None:
    zero = bytes(4096)
    with open_snapshot(saved.path) as snapshot:
        for name, memory in saved.blocks.items():
            pages = (memory[at : at + 4096] for at in range(0, len(memory), 4096))
            assert snapshot.blocks[name].data_pages == sum(page != zero for page in pages), name


def test_verify_accepts_what_qemu_wrote(saved: Saved) -> None:
    with open_snapshot(saved.path) as snapshot:
        snapshot.verify()


def test_any_range_of_a_block_reads_as_qemu_has_it(saved: Saved) -> None:
    with open_snapshot(saved.path) as snapshot:
        for name, memory in saved.blocks.items():
            block, end = snapshot.blocks[name], len(memory)
            for offset, length in [(0, 1), (end // 2 - 1, 2), (end - 3, 3), (1, end - 2), (end, 0)]:
                same = block.read(offset, length) == memory[offset : offset + length]
                assert same, (name, offset, length)


def test_leaving_clear_pages_leaves_exactly_those(saved: Saved) -> None:
    zero, old = bytes(4096), b"\xa5" * 4096
    with open_snapshot(saved.path) as snapshot:
        blocks = {name: bytearray(b"\xa5") * len(data) for name, data in saved.blocks.items()}
        snapshot.load(blocks, clear="leave")
    for name, memory in saved.blocks.items():
        pages = (memory[at : at + 4096] for at in range(0, len(memory), 4096))
        expected = b"".join(old if page == zero else page for page in pages)
        assert_same_memory(blocks[name], expected, name)


@pytest.mark.parametrize("short_by", [1, 5, 4096, 1 << 20, 20 << 20])
def test_file_of_qemu_cut_short_is_refused(saved: Saved, disk: Path, short_by: int) -> None:
    cut = disk / "cut.mapped"
    cut.write_bytes(saved.path.read_bytes())
    os.truncate(cut, cut.stat().st_size - short_by)
    with pytest.raises(SnapshotError), open_snapshot(cut) as snapshot:
        snapshot.verify()


def test_save_that_qemu_cancelled_is_refused(disk: Path) -> None:
    path = disk / "guest.mapped"
    with GuestRam(RAM) as ram, Qemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.DENSE)
        vm.start_save(path, Mode(), bandwidth=1 << 20)
        while path.stat().st_blocks < 1024:
            time.sleep(0.01)
        vm.execute("migrate_cancel")
        assert vm.wait()["status"] == "cancelled"
    with pytest.raises(SnapshotError), open_snapshot(path) as snapshot:
        snapshot.verify()


def test_background_snapshot_without_bitmaps_is_told_apart(disk: Path) -> None:
    """QEMU reports success, yet the file says that all memory is zero."""
    path = disk / "guest.mapped"
    # It takes private memory and a guest that runs.
    with GuestRam(RAM) as ram, Qemu(ram, private=True, run=True) as vm:
        try:
            vm.set_capabilities({"background-snapshot": True})
        except QemuRefused as error:
            pytest.skip(error.desc)
        vm.save(path)
    with open_snapshot(path) as snapshot:
        snapshot.verify()
        assert snapshot.stream.background
