"""ELF cores and LiME files of made snapshots, read back by pyelftools and by hand."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import (
    Descriptors,
    NoSpace,
    NotSupported,
    PyqmigrateError,
    RamBlock,
    SnapshotError,
    UsageError,
    convert,
    open_snapshot,
    save,
)
from pyqmigrate.export.image import ImageReport
from pyqmigrate.format.address_space.physical_map import parse_placement
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from pyqmigrate.io.output import OutputFile
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from tests.harness.directories import directory_on_disk
from tests.harness.examples import few, some
from tests.harness.physical import Physical
from tests.harness.snapshots import data_bytes, ram
from tests.harness.stream_builders import Raw

FORMS = ["elf", "lime"]
MACHINE = "pc-q35-10.0"
KINDS = ["mapped-ram", "stream", "libvirt", "offset"]

BLOCKS = {
    "pc.ram": ram(900, seed=1).tobytes(),
    "0000:00:01.0/vga.vram": ram(64, seed=2).tobytes(),
    "pc.bios": ram(48, seed=3, density=1).tobytes(),
}
# With a VGA card's window, and firmware that lets RAM be seen below 1 MiB.
SEEN = {
    0: BLOCKS["pc.ram"][:0xA0000],
    0xC0000: BLOCKS["pc.ram"][0xC0000:],
    0xFFFD0000: BLOCKS["pc.bios"],
}


def make(path: Path, kind: str, machine: str = MACHINE, **blocks: bytes) -> Path:
    """A snapshot of that kind, of BLOCKS if of no others."""
    memories = [RamBlock(name, memory) for name, memory in (blocks or BLOCKS).items()]
    if kind == "stream":
        start_sequential_save(path, memories, machine=machine).wait()
    elif kind == "libvirt":
        path.write_bytes(
            encode_header(
                LibvirtHeader(True, 2, ImageFormat.SPARSE, True, "<domain/>", "", 5000, "little")
            )
        )
        save(f"file:{path},offset=5000", memories, machine=machine)
    elif kind == "offset":
        save(f"file:{path},offset=0x1234", memories, machine=machine)
    else:
        save(path, memories, machine=machine)
    return path


def export(source: Path, target: Path, form: str, **options: Any) -> tuple[Physical, ImageReport]:
    offset = 0x1234 if source.name == "offset" else None
    with open_snapshot(source, offset=offset) as snapshot:
        report = convert(snapshot, target, to=form, **options)
    assert isinstance(report, ImageReport)
    return (Physical.of_elf if form == "elf" else Physical.of_lime)(target), report


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_seen_by_address(kind: str, form: str, disk: Path) -> None:
    image, report = export(make(disk / kind, kind), disk / "to", form)
    assert image.all() == SEEN
    assert [(one.address, one.length) for one in report.ranges] == [*image.lengths.items()]
    assert report.unplaced == ("0000:00:01.0/vga.vram",)
    assert report.file_size == (disk / "to").stat().st_size
    assert sorted(path.name for path in disk.iterdir()) == sorted([kind, "to"])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sparse", ["auto", "exact", "dense"])
@pytest.mark.parametrize("form", FORMS)
def test_every_way_of_writing_gives_the_same_memory(
    form: str, sparse: str, channels: int, disk: Path
) -> None:
    for direct_io in ("off", "on" if form == "elf" else "auto"):
        image, report = export(
            make(disk / "s", "mapped-ram"),
            disk / "to",
            form,
            sparse=sparse,
            channels=channels,
            direct_io=direct_io,
        )
        assert image.all() == SEEN
        assert (report.sparse, report.channels) == (sparse, channels)
        assert report.direct_io == (direct_io == "on")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["mapped-ram", "stream"])
def test_zero_pages_are_holes(kind: str, form: str, disk: Path) -> None:
    memory = bytearray(64 << 20)
    for page in (0, 300, 9000, 16383):
        memory[page * 4096 : (page + 1) * 4096] = os.urandom(4096)
    source = make(disk / kind, kind, **{"pc.ram": bytes(memory)})
    image, report = export(source, disk / "to", form, sparse="exact")
    assert image.all() == {0: bytes(memory)}
    assert (report.data_pages, report.zero_pages) == (4, 16380)
    # A page of LiME's touches two of the file system's.
    assert data_bytes(disk / "to", 0, report.file_size) <= 9 * 4096 + 4096
    assert report.bytes_allocated < 128 << 10


@pytest.mark.parametrize("form", FORMS)
def test_blocks_are_placed_by_hand(form: str, disk: Path) -> None:
    source = make(disk / "s", "mapped-ram")
    given = [
        parse_placement("0000:00:01.0/vga.vram@0x100000000"),
        parse_placement("pc.ram@0x8000+4096,8192"),
        parse_placement("pc.ram@0x1000+0x100000,0x1000"),
    ]
    image, report = export(source, disk / "to", form, placements=given)
    assert image.all() == {
        0x1000: BLOCKS["pc.ram"][0x100000:0x101000],
        0x8000: BLOCKS["pc.ram"][4096:12288],
        0xFFFD0000: BLOCKS["pc.bios"],
        0x100000000: BLOCKS["0000:00:01.0/vga.vram"],
    }
    assert report.unplaced == ()


def test_block_without_an_end_in_sight_takes_no_room_it_does_not_show(disk: Path) -> None:
    source = make(disk / "s", "mapped-ram", machine="any", ram=ram(2048, density=1).tobytes())
    given = [parse_placement("ram@0+0x700000,0x1000")]
    with pytest.raises(NotSupported, match="LiME"):
        export(source, disk / "to", "elf", placements=given)
    image, report = export(source, disk / "to", "lime", placements=given)
    assert (report.file_size, image.lengths) == (4128, {0: 4096})


@pytest.mark.parametrize("form", FORMS)
def test_odd_names_are_placed_as_they_are(form: str, disk: Path) -> None:
    name = "a@b+1,2 \x1b[2J/é"
    source = make(disk / "s", "mapped-ram", **{name: ram(3, density=1).tobytes()})
    given = [parse_placement(f"{name}@0x1000")]
    image, report = export(source, disk / "to", form, placements=given)
    assert image.lengths == {0x1000: 3 * 4096}
    assert report.ranges[0].block == name


@pytest.mark.parametrize("kind", ["mapped-ram", "stream"])
def test_elf_has_the_vmcoreinfo_of_linux(kind: str, disk: Path) -> None:
    text = b"OSRELEASE=6.1.0\nPAGESIZE=4096\n"
    note = struct.pack("<III", 11, len(text), 0) + b"VMCOREINFO\0\0" + text
    memory = bytearray(ram(3000, seed=5).tobytes())
    memory[8192 : 8192 + 28] = struct.pack("<III", 11, 99, 0) + b"VMCOREDUMP\0\0XYZ="
    memory[2500 * 4096 : 2500 * 4096 + len(note)] = note
    source = make(disk / kind, kind, **{"pc.ram": bytes(memory)})
    image, _ = export(source, disk / "to", "elf")
    assert [(n.name, n.kind, n.content) for n in image.notes] == [("VMCOREINFO", 0, text)]


def note_of(release: str) -> bytes:
    text = f"OSRELEASE={release}\n".encode()
    return struct.pack("<III", 11, len(text), 0) + b"VMCOREINFO\0\0" + text


@pytest.mark.parametrize("channels", [1, 4])
def test_of_several_notes_it_is_the_first(channels: int, disk: Path) -> None:
    memory = bytearray(100 << 20)
    for at in (99, 70, 40, 1):
        memory[at << 20 : (at << 20) + 64] = note_of(f"6.{at}").ljust(64, b"\0")
    source = make(disk / "s", "mapped-ram", **{"pc.ram": bytes(memory)})
    image, _ = export(source, disk / "to", "elf", channels=channels)
    assert [n.content for n in image.notes] == [b"OSRELEASE=6.1\n"]


def test_note_is_found_among_pages_smaller_than_linuxs(disk: Path) -> None:
    memory = bytearray(ram(64, page_size=1024).tobytes())
    memory[20480 : 20480 + 64] = note_of("6.1").ljust(64, b"\0")
    save(
        disk / "s",
        [RamBlock("mach-virt.ram", bytes(memory), 1024)],
        machine="virt-9.2",
        target_page_bits=10,
    )
    for part, found in (("+3072,0xd000", [b"OSRELEASE=6.1\n"]), ("+3072,1024", [])):
        given = [parse_placement(f"mach-virt.ram@0x40000c00{part}")]
        image, _ = export(disk / "s", disk / "to", "elf", placements=given)
        assert [n.content for n in image.notes] == found


def bytes_read_here() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_memory_is_read_once(disk: Path) -> None:
    length = 64 << 20
    memory = bytearray(os.urandom(length))
    memory[length // 2 : length // 2 + 64] = note_of("6.1").ljust(64, b"\0")
    with open_snapshot(make(disk / "s", "mapped-ram", **{"pc.ram": bytes(memory)})) as snapshot:
        before = bytes_read_here()
        convert(snapshot, disk / "to", to="elf")
        assert bytes_read_here() - before < length + (4 << 20)
    assert [n.content for n in Physical.of_elf(disk / "to").notes] == [b"OSRELEASE=6.1\n"]


def test_note_that_leaves_its_block_is_none(disk: Path) -> None:
    memory = bytearray(ram(8).tobytes())
    note = struct.pack("<III", 11, 8192, 0) + b"VMCOREINFO\0\0OSRELEASE="
    memory[7 * 4096 : 7 * 4096 + len(note)] = note
    image, _ = export(
        make(disk / "s", "mapped-ram", **{"pc.ram": bytes(memory)}), disk / "to", "elf"
    )
    assert image.notes == ()


@some
@given(st.data())
def test_part_of_a_block_is_memory_of_its_own(data: st.DataObject) -> None:
    with directory_on_disk() as directory:
        kind = data.draw(st.sampled_from(["mapped-ram", "stream"]))
        memory = ram(300, seed=data.draw(st.integers(0, 9)))
        source = make(directory / kind, kind, machine="any", ram=memory.tobytes())
        first = data.draw(st.integers(0, 299)) * 4096
        length = data.draw(st.integers(1, 300 - first // 4096)) * 4096
        image, report = export(
            source,
            directory / "to",
            "lime",
            placements=[parse_placement(f"ram@{first}+{first},{length}")],
            sparse=data.draw(st.sampled_from(["auto", "exact", "dense"])),
        )
        assert image.all() == {first: memory.tobytes()[first : first + length]}
        assert report.data_pages + report.zero_pages == length // 4096


@pytest.mark.parametrize("size", [1024, 65536])
@pytest.mark.parametrize("form", FORMS)
def test_pages_of_any_size_are_exported(form: str, size: int, disk: Path) -> None:
    memory = ram(40, page_size=size).tobytes()
    save(
        disk / "s",
        [RamBlock("mach-virt.ram", memory, size)],
        machine="virt-9.2",
        target_page_bits=size.bit_length() - 1,
    )
    image, _ = export(disk / "s", disk / "to", form)
    assert image.all() == {1 << 30: memory}


# ---- what cannot be done -----------------------------------------------------------------------


def refused(source: Path, form: str, error: type[Exception], match: str, **options: Any) -> None:
    target = source.parent / "to"
    with pytest.raises(error, match=match):
        export(source, target, form, **options)
    assert not target.exists()
    assert not [path for path in source.parent.iterdir() if path != source]


@pytest.mark.parametrize("form", FORMS)
def test_unknown_machine_is_refused_and_says_what_to_do(form: str, disk: Path) -> None:
    source = make(disk / "s", "mapped-ram", machine="toaster")
    refused(source, form, NotSupported, "--map")


@pytest.mark.parametrize("form", FORMS)
def test_parts_that_are_not_whole_pages_are_refused(form: str, disk: Path) -> None:
    source = make(disk / "s", "mapped-ram")
    refused(source, form, UsageError, "whole pages", placements=[parse_placement("pc.ram@0+1,4")])


def test_lime_with_direct_io_demanded_is_refused(disk: Path) -> None:
    refused(make(disk / "s", "mapped-ram"), "lime", UsageError, "direct I/O", direct_io="on")


@pytest.mark.parametrize("form", ["raw", "stream", "mapped-ram"])
def test_placements_are_refused_for_other_forms(form: str, disk: Path) -> None:
    with pytest.raises(UsageError, match="placements"):
        convert(
            make(disk / "s", "mapped-ram"),
            disk / "to",
            to=form,
            placements=[parse_placement("pc.ram@0")],
        )


@pytest.mark.parametrize("order", ["little", "big"])
def test_byte_order_can_be_given(order: Any, disk: Path) -> None:
    source = make(disk / "s", "mapped-ram", "pseries-10.0", **{"ppc_spapr.ram": bytes(4 << 20)})
    image, _ = export(source, disk / "to", "elf", byte_order=order)
    assert (disk / "to").read_bytes()[5] == (1 if order == "little" else 2)
    assert image.machine == "EM_PPC64"


def test_byte_order_is_refused_where_it_has_no_meaning(disk: Path) -> None:
    source = make(disk / "s", "mapped-ram")
    for form, order in (("lime", "big"), ("raw", "little"), ("elf", "middle")):
        with pytest.raises(UsageError, match=r"byte.order"):
            convert(source, disk / "to", to=form, byte_order=order)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["raw", *FORMS])
def test_memories_are_refused_where_they_have_no_meaning(form: str, disk: Path) -> None:
    with pytest.raises(UsageError, match="memories"):
        convert(make(disk / "s", "mapped-ram"), disk / "to", to=form, memories={"pc.ram": b""})


@pytest.mark.parametrize("form", FORMS)
def test_file_that_lost_its_pages_is_refused(form: str, disk: Path) -> None:
    source = make(disk / "s", "mapped-ram")
    with open_snapshot(source) as snapshot:
        os.truncate(source, (1 << 20) + 200 * 4096)
        with pytest.raises(SnapshotError, match="truncated"):
            convert(snapshot, disk / "to", to=form)
    assert not (disk / "to").exists()


@pytest.mark.parametrize("form", FORMS)
def test_block_that_is_elsewhere_is_refused(form: str, disk: Path) -> None:
    file = Raw(
        machine=b"pc",
        capabilities=("x-ignore-shared", "mapped-ram"),
        gpa=bytes(8),
        bitmap_offset=0,
        pages_offset=0,
    ).file()
    (disk / "s").write_bytes(file.read_at(0, file.size))
    refused(disk / "s", form, UsageError, "--memory")


@pytest.mark.parametrize("form", FORMS)
def test_full_disk_is_noticed_before_the_first_page(
    form: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(disk / "s", "mapped-ram")
    monkeypatch.setattr(OutputFile, "free_bytes", lambda _self: 100 << 10)
    refused(source, form, NoSpace, "MiB are free")


@pytest.mark.parametrize("form", FORMS)
def test_room_for_the_data_alone_is_enough(
    form: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two parts of RAM that LiME has could hold more, for all that is known unseen."""
    source = make(disk / "s", "mapped-ram")
    monkeypatch.setattr(OutputFile, "free_bytes", lambda _self: 3 << 20)
    assert export(source, disk / "to", form)[0].all() == SEEN


@pytest.mark.parametrize("form", FORMS)
def test_source_is_not_overwritten_in_place(form: str, disk: Path) -> None:
    source = make(disk / "s", "mapped-ram")
    before = source.read_bytes()
    fd = os.open(source, os.O_RDWR)
    try:
        with pytest.raises(UsageError):
            convert(source, Descriptors(fd), to=form)
    finally:
        os.close(fd)
    assert source.read_bytes() == before


@pytest.mark.parametrize("form", FORMS)
def test_descriptor_receives_the_file(form: str, disk: Path) -> None:
    source = make(disk / "s", "mapped-ram")
    fd = os.open(disk / "to", os.O_RDWR | os.O_CREAT)
    try:
        convert(source, Descriptors(fd), to=form)
    finally:
        os.close(fd)
    read = Physical.of_elf if form == "elf" else Physical.of_lime
    assert read(disk / "to").all() == SEEN


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("same_descriptors")
def test_progress_that_raises_leaves_nothing(form: str, disk: Path) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    source = make(disk / "s", "mapped-ram")
    with pytest.raises(KeyboardInterrupt):
        convert(source, disk / "to", to=form, progress=stop)
    source.unlink()
    for path in disk.iterdir():  # the job may have been done when it was to stop
        assert path.name == "to"
        assert (Physical.of_elf if form == "elf" else Physical.of_lime)(path).all() == SEEN


@pytest.mark.parametrize("length", [1 << 62, (1 << 63) - 4096])
@pytest.mark.parametrize("form", FORMS)
def test_length_beyond_any_file_raises_an_error_of_the_package(
    form: str, length: int, disk: Path
) -> None:
    source = make(disk / "s", "stream", machine="virt-9.2", **{"mach-virt.ram": bytes(8192)})
    data = source.read_bytes()
    for old, new in ((8192 | 4, length | 4), (8192, length)):
        data = data.replace(struct.pack(">Q", old), struct.pack(">Q", new), 1)
    source.write_bytes(data)
    refused(source, form, PyqmigrateError, "too large")


def damaged(data: bytes, choose: random.Random) -> bytes:
    """Bytes of the head changed, mostly."""
    changed = bytearray(data)
    for _ in range(choose.choice((1, 1, 2, 8))):
        at = choose.randrange(choose.choice((64, 400, len(data))))
        length = choose.choice((1, 4, 8))
        changed[at : at + length] = choose.choice(
            (choose.randbytes(length), bytes(length), b"\xff" * length)
        )
    return bytes(changed)


@few
@given(st.sampled_from(["mapped-ram", "stream"]), st.integers(0, 1 << 32))
def test_damaged_snapshot_gives_a_result_or_an_error_of_the_package(kind: str, seed: int) -> None:
    choose = random.Random(seed)
    with directory_on_disk() as directory:
        make(directory / kind, kind, **{"pc.ram": ram(20).tobytes(), "pc.bios": ram(4).tobytes()})
        data = (directory / kind).read_bytes()
        for _ in range(10):
            (directory / "s").write_bytes(damaged(data, choose))
            for form in FORMS:
                attempt(lambda form=form: export(directory / "s", directory / "to", form))


def attempt(do: Callable[[], object]) -> None:
    try:
        do()
    except PyqmigrateError as error:
        assert str(error)
