"""What the reader makes of whole streams."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.mapped_ram import PAGE_SIZES
from pyqmigrate.format.stream.mapped_ram_reader import parse
from pyqmigrate.format.stream.wire import SectionKind
from pyqmigrate.format.stream.writer import encode_head, encode_tail
from tests.harness.stream_builders import (
    RAM_EOS,
    Raw,
    command,
    described,
    device,
    end,
    file_of,
    full,
    part,
    snapshot,
    start,
    str8,
    words,
)

names = st.binary(min_size=1, max_size=30).map(lambda data: data.decode("utf-8", "surrogateescape"))


@given(
    machine=st.text(st.characters(codec="utf-8"), max_size=40),
    blocks=st.lists(st.tuples(names, st.integers(1, 5000)), max_size=6, unique_by=lambda b: b[0]),
    page_size=st.sampled_from(PAGE_SIZES),
    stated=st.booleans(),
    offset=st.integers(0, 1 << 30),
    switchover=st.booleans(),
)
def test_stream_parses_back_to_what_was_encoded(
    machine: str,
    blocks: list[tuple[str, int]],
    page_size: int,
    stated: bool,
    offset: int,
    switchover: bool,
) -> None:
    specs = [BlockSpec(name, pages * page_size, page_size) for name, pages in blocks]
    bits = page_size.bit_length() - 1 if stated else None
    head = encode_head(machine, specs, offset=offset, target_page_bits=bits)
    source = file_of(head, encode_tail(switchover_start=switchover, page_size=page_size))
    stream = parse(source, offset)
    assert stream.machine == machine
    assert stream.blocks == head.blocks
    assert stream.total_ram == sum(spec.length for spec in specs)
    assert stream.target_page_bits == bits
    assert stream.capabilities == ("mapped-ram",)
    assert stream.description == {"page_size": page_size, "devices": []}
    assert stream.end == source.size
    assert stream.complete and not stream.opaque_tail
    assert ("switchover-start" in [section.name for section in stream.sections]) == switchover


def test_elements_tile_the_stream() -> None:
    devices = full(3, "timer", b"t" * 24) + full(9, "cpu", b"c" * 7, instance=2)
    text = described(device("timer", 24), device("cpu", 7, instance=2))
    source = snapshot(sections=devices, description=text, switchover_start=True)
    stream = parse(source)
    assert [section.kind.name for section in stream.sections] == [
        "START",
        "PART",
        "COMMAND",
        "END",
        "FULL",
        "FULL",
    ]
    for before, after in zip(stream.sections, stream.sections[1:], strict=False):
        assert before.offset + before.length == after.offset
    last = stream.sections[-1]
    assert stream.description_offset == last.offset + last.length + 1
    assert (last.section_id, last.name, last.instance_id, last.version_id) == (9, "cpu", 2, 1)
    assert source.read_at(last.body_offset, last.body_length) == b"c" * 7


def test_end_of_ram_is_where_its_section_starts() -> None:
    source = snapshot()
    stream = parse(source)
    assert source.read_at(stream.ram_end, 5) == b"\x03\0RAM"


def test_only_framing_is_read() -> None:
    source = snapshot(BlockSpec("pc.ram", 1 << 40), BlockSpec("vga.vram", 1 << 30))
    parse(source)
    assert source.bytes_read < 2 << 20


def test_bytes_before_the_stream_are_not_looked_at() -> None:
    head = encode_head("pc", [BlockSpec("pc.ram", 65536)], offset=5000)
    assert parse(file_of(head, encode_tail(), b"LibvirtQemudSave" * 300), 5000).complete


def test_bytes_after_the_stream_are_ignored() -> None:
    head = encode_head("pc", [BlockSpec("a", 4096)])
    stream = parse(file_of(head, encode_tail() + b"garbage"))
    assert stream.complete
    assert stream.end == head.tail_offset + len(encode_tail())


def test_zero_padding_after_the_stream_is_ignored() -> None:
    source = snapshot(sections=full(2, "cpu", b"1234"), description=described(device("cpu", 4)))
    padded = source.cut(source.size)
    padded.size += 4096
    stream = parse(padded)
    assert stream.end == source.size
    assert [section.name for section in stream.sections][-1] == "cpu"


def test_section_id_of_ram_is_free() -> None:
    assert parse(Raw(ram_id=77).file()).complete


def test_commands_may_precede_ram() -> None:
    stream = parse(Raw(before=command(3) + command(8), inside=command(200, b"payload")).file())
    assert [s.name for s in stream.sections] == [
        "postcopy-advise",
        "enable-colo",
        "ram",
        "command 200",
        "ram",
    ]


def test_uuid_is_read() -> None:
    value = uuid.uuid4().bytes
    plain = Raw().file().pieces[0][1]
    capabilities = plain[15 : 15 + 47]
    subsections = capabilities + b"\x05" + str8("configuration/uuid") + b"\0\0\0\x01" + value
    assert parse(Raw(subsections=subsections).file()).uuid == value


def test_early_device_between_start_and_part_is_stepped_over_with_its_description() -> None:
    # The body holds what looks like a footer: the length has to win over a search.
    body = b"\x7e\0\0\0\x05\x02\0\0\0\x01"
    early = full(5, "virtio-mem-device-early", body) + part(1, RAM_EOS)
    text = described(device("virtio-mem-device-early", len(body)))
    stream = parse(Raw(inside=early, description=text).file())
    assert stream.sections[1].body_length == len(body)


def test_early_device_without_description_is_stepped_over_by_its_footer() -> None:
    early = full(5, "virtio-mem-device-early", b"\x7e\0\0\0\x05" * 3) + part(1, RAM_EOS)
    stream = parse(Raw(inside=early, description=None).file())
    assert stream.complete
    assert [section.name for section in stream.sections][1] == "virtio-mem-device-early"


def test_device_before_ram_is_stepped_over() -> None:
    text = described(device("early", 3))
    assert parse(Raw(before=full(5, "early", b"abc"), description=text).file()).complete


@pytest.mark.parametrize("stated", [0, 4, 1 << 40])
def test_wrong_length_in_the_description_is_made_good_by_the_footer(stated: int) -> None:
    devices = full(2, "array", b"0123456789") + full(3, "cpu", b"abc")
    text = described(device("array", stated), device("cpu", 3))
    stream = parse(Raw(devices=devices, description=text).file())
    assert [section.body_length for section in stream.sections[-2:]] == [10, 3]


def test_footer_search_does_not_stop_at_what_only_looks_like_a_footer() -> None:
    body = b"\x7e\0\0\0\x02\0more \x7e\0\0\0\x02\x04\0\0\0\x09\x03xyz more"
    devices = full(2, "array", body) + full(3, "cpu", b"abc")
    text = described(device("array", 1), device("cpu", 3))
    stream = parse(Raw(devices=devices, description=text).file())
    assert [section.body_length for section in stream.sections[-2:]] == [len(body), 3]


def test_devices_without_description_are_found_by_their_footers() -> None:
    devices = full(2, "cpu", b"abc") + full(3, "timer", b"\x7e\0\0\0\x03" * 4)
    stream = parse(Raw(devices=devices, description=None).file())
    assert stream.complete
    assert [section.body_length for section in stream.sections[-2:]] == [3, 20]


def test_devices_without_description_that_are_cut_leave_an_opaque_tail() -> None:
    whole = Raw(devices=full(2, "cpu", b"abc"), description=None).file()
    source = whole.cut(whole.size - 3)
    stream = parse(source)
    assert stream.opaque_tail
    assert not stream.complete
    assert stream.end == source.size
    assert [section.kind for section in stream.sections] == [SectionKind.START, SectionKind.END]


def test_device_that_does_not_fit_its_description_leaves_an_opaque_tail() -> None:
    broken = full(2, "cpu", b"abc")[:-1] + b"\xff"
    stream = parse(Raw(devices=broken, description=described(device("cpu", 3))).file())
    assert stream.opaque_tail
    assert stream.complete


def test_stream_without_devices_needs_no_description() -> None:
    stream = parse(Raw(description=None).file())
    assert stream.complete
    assert stream.description is None


def test_guest_address_is_read_where_shared_memory_is_ignored() -> None:
    raw = Raw(capabilities=("x-ignore-shared", "mapped-ram"), gpa=words(0x1_0000_0000))
    assert parse(raw.file()).blocks[0].gpa == 0x1_0000_0000


def test_external_block_is_not_jumped_over() -> None:
    raw = Raw(
        capabilities=("x-ignore-shared", "mapped-ram"),
        gpa=words(0),
        bitmap_offset=0,
        pages_offset=0,
    )
    stream = parse(raw.file())
    assert stream.blocks[0].external
    assert stream.total_ram == 65536


def test_bitmap_may_be_after_the_pages() -> None:
    raw = Raw(bitmap_offset=(1 << 20) + 65536 + 5000, size=2 << 20, description=None)
    assert parse(raw.file()).blocks[0].bitmap_offset == (1 << 20) + 65536 + 5000


def test_pages_need_only_page_alignment() -> None:
    assert parse(Raw(pages_offset=8192).file()).blocks[0].pages_offset == 8192


def test_bitmap_with_words_of_32_bits_is_accepted() -> None:
    raw = Raw(bitmap_offset=4096 - 4, pages_offset=4096)
    assert parse(raw.file()).blocks[0].bitmap_size == 8


def test_ram_block_may_be_called_ram() -> None:
    assert parse(Raw(name=b"ram").file()).blocks[0].name == "ram"


def test_undecodable_names_survive() -> None:
    stream = parse(Raw(name=b"\xff\xfe", machine=b"\xe4").file())
    assert stream.blocks[0].name.encode("utf-8", "surrogateescape") == b"\xff\xfe"
    assert stream.machine.encode("utf-8", "surrogateescape") == b"\xe4"


def test_parts_by_the_ten_thousand_are_walked_and_not_all_listed() -> None:
    stream = parse(Raw(inside=part(1, RAM_EOS) * 70000).file())
    kinds = [section.kind for section in stream.sections]
    assert kinds.count(SectionKind.PART) == (1 << 16) - 1
    assert kinds[-1] is SectionKind.END


def test_other_live_sections_interleave_with_ram() -> None:
    inside = start(2, "dirty-bitmap", 1, b"\x01") + part(1, RAM_EOS) + part(2, b"\x01")
    stream = parse(Raw(inside=inside, devices=end(2, b"\x01")).file())
    assert [(s.kind.name, s.name) for s in stream.sections] == [
        ("START", "ram"),
        ("START", "dirty-bitmap"),
        ("PART", "ram"),
        ("PART", "dirty-bitmap"),
        ("END", "ram"),
        ("END", "dirty-bitmap"),
    ]


def test_private_live_section_is_stepped_over_by_its_footer() -> None:
    inside = start(2, "vfio", 1, b"private") + part(2, b"more private") + part(1, RAM_EOS)
    stream = parse(Raw(inside=inside, devices=end(2, b"last")).file())
    assert stream.sections[-1].name == "vfio"
    assert stream.complete
