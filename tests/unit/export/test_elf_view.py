"""An ELF core that is read without being written: the same bytes as the file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pyqmigrate import RamBlock, UsageError, convert, open_snapshot, save
from pyqmigrate.export.elf_layout import ElfLayout
from pyqmigrate.export.elf_view import ElfView
from pyqmigrate.export.vmcoreinfo import find_vmcoreinfo
from pyqmigrate.format.dump.elf import encode_note
from tests.harness.snapshots import ram

BLOCKS = {
    "pc.ram": ram(900, seed=1).tobytes(),
    "0000:00:01.0/vga.vram": ram(64, seed=2).tobytes(),
    "pc.bios": ram(48, seed=3, density=1).tobytes(),
}
NOTE = encode_note("VMCOREINFO", 0, b"OSRELEASE=6.1.0\nPAGESIZE=4096\n")


def made(path: Path, **changed: bytes) -> Path:
    blocks = [RamBlock(name, memory) for name, memory in (BLOCKS | changed).items()]
    save(path, blocks, machine="pc-q35-10.0")
    return path


def with_note(page: int) -> dict[str, bytes]:
    memory = bytearray(BLOCKS["pc.ram"])
    memory[page * 4096 : page * 4096 + len(NOTE)] = NOTE
    return {"pc.ram": bytes(memory)}


def test_view_has_the_bytes_of_the_written_core(tmp_path: Path) -> None:
    path = made(tmp_path / "s", **with_note(700))
    convert(path, tmp_path / "elf", to="elf")
    whole = (tmp_path / "elf").read_bytes()
    with open_snapshot(path) as snapshot:
        layout = ElfLayout.of(snapshot)
        view = ElfView(snapshot, layout, find_vmcoreinfo(snapshot, snapshot.blocks.values()))
        assert view.size == len(whole)
        assert view.read(0, view.size) == whole
        chance = random.Random(4)
        for _ in range(200):
            start = chance.randrange(view.size)
            length = chance.choice([1, 8, 4096, 70000])
            assert view.read(start, length) == whole[start : start + length]


def test_view_ends_where_the_file_does(tmp_path: Path) -> None:
    with open_snapshot(made(tmp_path / "s")) as snapshot:
        view = ElfView(snapshot, ElfLayout.of(snapshot))
        assert len(view.read(view.size - 5, 100)) == 5
        assert view.read(view.size + 1, 100) == b""


@pytest.mark.parametrize("place", [(-1, 1), (0, -1)])
def test_negative_numbers_are_refused(tmp_path: Path, place: tuple[int, int]) -> None:
    with open_snapshot(made(tmp_path / "s")) as snapshot:
        view = ElfView(snapshot, ElfLayout.of(snapshot))
        with pytest.raises(UsageError, match="not a part of a file"):
            view.read(*place)


@pytest.mark.parametrize("page", [0, 511, 899])
def test_vmcoreinfo_is_found_wherever_it_is(tmp_path: Path, page: int) -> None:
    with open_snapshot(made(tmp_path / "s", **with_note(page))) as snapshot:
        assert find_vmcoreinfo(snapshot, snapshot.blocks.values()) == NOTE


def test_memory_without_vmcoreinfo_has_none(tmp_path: Path) -> None:
    with open_snapshot(made(tmp_path / "s")) as snapshot:
        assert find_vmcoreinfo(snapshot, snapshot.blocks.values()) == b""


def test_search_reads_no_block_after_the_one_with_the_note(tmp_path: Path) -> None:
    with open_snapshot(made(tmp_path / "s", **with_note(3))) as snapshot:
        blocks = iter(snapshot.blocks.values())
        assert find_vmcoreinfo(snapshot, blocks) == NOTE
        assert len(list(blocks)) == len(BLOCKS) - 1
