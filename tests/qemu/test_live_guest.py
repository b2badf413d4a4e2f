"""A guest that keeps changing its memory is saved live by QEMU; its snapshot is one instant."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyqmigrate import open_snapshot
from tests.harness.compare_memory import assert_same_memory
from tests.harness.machine import RAM_BLOCK, GuestRam, Mode, Qemu
from tests.harness.pattern_guest import build, check_pattern

pytestmark = pytest.mark.qemu

RAM = 24 << 20
MODES = [
    Mode(),
    Mode(channels=2, multifd=True),
    Mode(channels=2, multifd=True, direct_io=True),
    Mode(channels=8, multifd=True, direct_io=True, zero_pages="legacy"),
]


@dataclass(frozen=True)
class Live:
    """A snapshot of a running guest, its RAM when it was stopped, and what it had reported."""

    path: Path
    ram: bytes
    reports: bytes


def save_live(machine: str, mode: Mode, directory: Path) -> Live:
    path, serial = directory / "guest.mapped", directory / "serial"
    image = build(directory, RAM)
    with (
        GuestRam(RAM) as ram,
        Qemu(ram, machine=machine, run=True, bios=image, serial=serial) as vm,
    ):
        deadline = time.monotonic() + 60
        while len(serial.read_bytes()) < 2:
            assert time.monotonic() < deadline, "the guest does not run"
            time.sleep(0.01)
        vm.save(path, mode)
        return Live(path, ram.memory[:], serial.read_bytes())


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("machine", RAM_BLOCK)
def test_live_snapshot_is_one_instant_of_the_guest(machine: str, mode: Mode, disk: Path) -> None:
    live = save_live(machine, mode, disk)
    with open_snapshot(live.path) as snapshot:
        blocks = {name: bytearray(block.length) for name, block in snapshot.blocks.items()}
        snapshot.load(blocks, channels=2)
    memory = blocks[RAM_BLOCK[machine]]
    instant = check_pattern(bytes(memory))
    assert_same_memory(memory, live.ram)
    done = instant.generation - 1
    assert live.reports[:done] == bytes(g & 0x7F for g in range(1, done + 1))
    assert len(live.reports) - done in (0, 1)


def test_stale_bytes_under_clear_bits_are_not_read(disk: Path) -> None:
    """Pages that turned zero during the save keep their former bytes in the file."""
    live = save_live("pc", Mode(channels=2, multifd=True), disk)
    with open_snapshot(live.path) as snapshot, live.path.open("rb") as file:
        block = snapshot.blocks["pc.ram"]
        zero, stale = bytes(4096), []
        for offset in range(0, block.length, 4096):
            if live.ram[offset : offset + 4096] == zero:
                file.seek(block.pages_offset + offset)
                stale += [offset] if file.read(4096) != zero else []
        assert stale, "this save left no stale page: the test proves nothing"
        assert all(block.read(offset, 4096) == zero for offset in stale)
