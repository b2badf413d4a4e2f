"""The facts of docs/internals/format.md, on files of the QEMU at hand."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pyqmigrate import open_snapshot
from tests.harness.contents import Contents, fill
from tests.harness.machine import GuestRam, MigrationFailed, Mode, Qemu, QemuDied
from tests.harness.sequential_saves import SequentialQemu

pytestmark = pytest.mark.qemu

RAM = 8 << 20
DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "internals" / "format.md"
READER = DOCS / "examples" / "read_mapped_ram.py"


def rows(heading: str) -> list[tuple[str, str]]:
    """The rows of the table under a heading, without its head."""
    text = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE)[1:]


def test_the_page_shows_the_reader() -> None:
    assert READER.read_text() in PAGE.read_text()


def test_the_picture_is_beside_the_page() -> None:
    names = re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE.read_text())
    assert names == ["mapped-ram.svg"]
    assert (PAGE.parent / names[0]).read_text().startswith("<svg")


@pytest.mark.parametrize("mode", [Mode(), Mode(channels=2, multifd=True, direct_io=True)], ids=str)
@pytest.mark.parametrize("machine", ["pc", "microvm"])
def test_the_reader_reads_what_qemu_saved(machine: str, mode: Mode, disk: Path) -> None:
    with GuestRam(RAM) as ram, Qemu(ram, machine=machine) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED)
        vm.save(disk / "guest", mode)
        block, machine_type, blocks = vm.ram_block, vm.machine_name(), vm.read_blocks()
    printed = subprocess.run(
        [sys.executable, READER, disk / "guest", block, disk / "out"],
        check=True,
        text=True,
        capture_output=True,
    ).stdout.splitlines()
    assert printed[0] == machine_type
    assert {line.rpartition(" (")[0] for line in printed[1:]} == set(blocks)
    assert (disk / "out").read_bytes() == blocks[block]


def test_pages_start_at_the_mib_after_the_bitmap(whole: Whole) -> None:
    assert whole.offset > 0
    for place in whole.places.values():
        assert place.bitmap == place.header + 28  # right after the four numbers
        words = -(-place.length // 4096 // 64) * 8
        assert place.pages == -(-(place.bitmap + words) // (1 << 20)) * (1 << 20)


def test_how_a_file_was_saved_leaves_no_trace(disk: Path) -> None:
    modes = [Mode(), Mode(channels=2, multifd=True, direct_io=True, zero_pages="legacy")]
    for n, mode in enumerate(modes):
        with GuestRam(RAM) as ram, Qemu(ram) as vm:
            fill(memoryview(ram.memory), Contents.RUNS)
            vm.save(disk / str(n), mode)
    with open_snapshot(disk / "0") as one, open_snapshot(disk / "1") as other:
        assert one.size == other.size
        assert [b.layout for b in one.blocks.values()] == [b.layout for b in other.blocks.values()]
        assert one.stream.capabilities == other.stream.capabilities == ("mapped-ram",)
        assert one.stream.sections == other.stream.sections


@dataclass
class Place:
    header: int
    length: int
    bitmap: int
    pages: int


@dataclass
class Whole:
    """A whole file of a stopped guest, and where its numbers are; ``offset`` as given."""

    data: bytes
    offset: int
    places: dict[str, Place] = field(default_factory=dict)
    sections: dict[str, tuple[int, int]] = field(default_factory=dict)
    end: int = 0
    description: int = 0


OFFSET = 0x1234


@pytest.fixture(scope="module")
def whole(module_disk: Path) -> Whole:
    path = module_disk / "whole"
    path.write_bytes(bytes(OFFSET))
    with GuestRam(RAM) as ram, Qemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED)
        vm.save(path, offset=OFFSET)
    with open_snapshot(path, offset=OFFSET) as snapshot:
        found = Whole(path.read_bytes(), OFFSET)
        found.places = {
            name: Place(b.bitmap_offset - 28, b.length, b.bitmap_offset, b.pages_offset)
            for name, b in snapshot.blocks.items()
        }
        found.sections = {
            f"{s.kind.name.lower()} {s.name}": (s.offset, s.length)
            for s in snapshot.stream.sections
        }
        assert snapshot.stream.description_offset is not None
        found.description, found.end = snapshot.stream.description_offset, snapshot.stream.end
    return found


def put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def without(whole: Whole, section: str) -> bytes:
    at, length = whole.sections[section]
    return whole.data[:at] + whole.data[at + length :]


def number(whole: Whole, at: int, form: str, value: int) -> bytes:
    return put(whole.data, at, struct.pack(form, value))


def flipped_page(whole: Whole) -> bytes:
    at = whole.places["pc.ram"].pages + RAM // 2
    return put(whole.data, at, bytes([whole.data[at] ^ 1]))


def cleared_bit(whole: Whole) -> bytes:
    at = whole.places["pc.ram"].bitmap + 16
    assert whole.data[at]
    return put(whole.data, at, b"\0")


def moved_bitmap(whole: Whole) -> bytes:
    place = whole.places["pc.ram"]
    bitmap = whole.data[place.bitmap : place.bitmap + RAM // 4096 // 8]
    moved = put(whole.data, place.bitmap, bytes(len(bitmap)))
    return put(moved, place.header + 12, struct.pack(">Q", len(moved))) + bitmap


def bits_past_the_end(whole: Whole) -> bytes:
    place = whole.places["/rom@etc/acpi/rsdp"]
    assert place.length == 4096
    return put(whole.data, place.bitmap, b"\xff")


CHANGES: dict[str, Callable[[Whole], bytes]] = {
    "has another machine type": lambda w: put(w.data, OFFSET + 13, b"xx"),
    "has no capability mapped-ram, where QEMU has it on": lambda w: put(
        w.data, w.data.index(b"mapped-ram"), b"x-postcopy"
    ),
    "has a block that is longer than the guest's": lambda w: number(
        w, w.places["pc.ram"].header - 8, ">Q", RAM + 4096
    ),
    "lacks the last byte of its device state": lambda w: w.data[: w.description - 7],
    "has a footer with another id": lambda w: number(
        w, sum(w.sections["full timer"]) - 4, ">I", 99
    ),
    "has its pages at no page boundary": lambda w: number(
        w, w.places["pc.ram"].header + 20, ">Q", w.places["pc.ram"].pages + 512
    ),
    "has a flipped bit in a page": flipped_page,
    "has a cleared bit in a bitmap": cleared_bit,
    "has its bitmap elsewhere in the file": moved_bitmap,
    "has bits set past the end of a block": bits_past_the_end,
    "has no description": lambda w: w.data[: w.description],
    "has no PART": lambda w: without(w, "part ram"),
    "has no END of RAM": lambda w: without(w, "end ram"),
    "has bytes after its end": lambda w: w.data + b"more",
}


def test_every_row_of_the_table_is_tried() -> None:
    assert [what for what, _ in rows("What QEMU checks, and what it does not")] == list(CHANGES)


@pytest.mark.parametrize(
    ("what", "verdict"), rows("What QEMU checks, and what it does not"), ids=lambda text: text
)
def test_qemu_does_as_the_page_says(what: str, verdict: str, whole: Whole, disk: Path) -> None:
    (disk / "changed").write_bytes(CHANGES[what](whole))
    with GuestRam(RAM) as ram, Qemu(ram, incoming=True) as vm:
        try:
            vm.load(disk / "changed", offset=OFFSET)
            done = "loads it"
        except (MigrationFailed, QemuDied):
            done = "refuses it"
    assert done == verdict


def test_sequential_stream_is_recognized_by_its_capabilities(disk: Path) -> None:
    with GuestRam(RAM) as ram, SequentialQemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED)
        vm.save(disk / "stream")
    with (disk / "stream").open("rb") as file:
        assert file.read(9) == b"QEVM\0\0\0\3\7"
        [length] = struct.unpack(">I", file.read(4))
        file.seek(length, 1)
        assert file.read(6) == b"\1\0\0\0\1\3"  # RAM's START: there are no subsections at all
