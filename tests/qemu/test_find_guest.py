"""Searches in a guest that QEMU saved: the places are those of grep in its memory, and of its address space."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pyqmigrate import convert, open_snapshot
from pyqmigrate.analysis.physical_memory import PhysicalMemory
from pyqmigrate.analysis.search import find
from pyqmigrate.errors import UsageError
from pyqmigrate.export.raw import unpack
from tests.harness.physical import Physical
from tests.harness.saved import RAM, Saved, save_guest

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    return save_guest(module_disk, ["-M", "pc", "-m", str(RAM >> 20)])


def grepped(path: Path, *words: str) -> list[int]:
    done = subprocess.run(
        ["grep", "-aboP", *words, path], capture_output=True, env={"LC_ALL": "C"}, check=False
    )
    return [int(found[1]) for found in re.finditer(rb"^(\d+):", done.stdout, re.MULTILINE)]


@pytest.mark.parametrize("pattern", ["BOCHS", "[A-Z]{8}", r"\xe8\x03"])
def test_places_are_those_that_grep_finds(saved: Saved, disk: Path, pattern: str) -> None:
    with open_snapshot(saved.path) as snapshot:
        report = unpack(snapshot, disk / "raw")
        total = 0
        for block in report.blocks:
            expected = grepped(disk / "raw" / str(block.file), pattern)
            found = find(snapshot, pattern.encode(), regex=True, block=block.name)
            assert sorted(match.offset for match in found) == expected
            total += len(expected)
        assert total
        found = [*find(snapshot, pattern.encode(), regex=True)]
    assert len(found) == len({(match.block, match.offset) for match in found}) == total
    addresses = [match.address for match in found if match.address is not None]
    assert addresses == sorted(addresses)


def test_addresses_are_those_of_the_elf_export(saved: Saved, disk: Path) -> None:
    convert(saved.path, disk / "elf", to="elf")
    elf = Physical.of_elf(disk / "elf")
    with open_snapshot(saved.path) as snapshot:
        memory = PhysicalMemory(snapshot)
        assert {place.address for place in memory.ranges} == set(elf.ranges)
        for place in memory.ranges:
            assert memory.read(place.address, 64) == elf.read(place.address, 64)
        border = memory.ranges[1].address
        assert memory.read(border - 8, 16) == (memory.read(border - 8, 8) + memory.read(border, 8))
        with pytest.raises(UsageError, match="no memory at address 0x80000000"):
            memory.read(0x80000000, 1)
        low = [*find(snapshot, b"\xea", addresses=(0xF0000, 0x100000))]
    assert low
    for match in low:
        assert match.address is not None
        assert 0xF0000 <= match.address < 0x100000
        with open_snapshot(saved.path) as snapshot:
            assert PhysicalMemory(snapshot).read(match.address, 1) == b"\xea"
            break
