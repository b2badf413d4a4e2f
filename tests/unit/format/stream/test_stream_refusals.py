"""Bad streams: each is refused, by name and place."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.elements import LISTED_MAX
from pyqmigrate.format.stream.mapped_ram_reader import parse
from pyqmigrate.format.stream.writer import encode_head, encode_tail
from tests.harness.stream_builders import (
    RAM_EOS,
    Raw,
    Sparse,
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

SHARED = ("x-ignore-shared", "mapped-ram")


def refusal(source: Sparse, offset: int = 0) -> SnapshotError:
    with pytest.raises(SnapshotError) as caught:
        parse(source, offset)
    return caught.value


def test_empty_file_is_refused() -> None:
    assert "it has only 0 bytes" in str(refusal(Sparse([], 0)))


def test_offset_past_the_end_is_refused() -> None:
    assert "past the end" in str(refusal(snapshot(), 1 << 40))


def test_zero_magic_says_that_the_save_did_not_finish() -> None:
    error = refusal(snapshot().patched(0, b"\0\0\0\0"))
    assert "did not finish" in str(error)
    assert error.field == "magic"


def test_other_magic_is_refused() -> None:
    assert "not a migration stream" in str(refusal(snapshot().patched(0, b"\x7fELF")))


def test_other_version_is_refused() -> None:
    assert "version 2" in str(refusal(snapshot().patched(4, b"\0\0\0\x02")))


def test_stream_without_configuration_is_refused() -> None:
    assert "configuration" in str(refusal(snapshot().patched(8, b"\x01")))


def test_machine_type_of_absurd_length_is_refused() -> None:
    assert refusal(snapshot().patched(9, b"\xff\xff\xff\xff")).field == "machine type"


def test_capability_list_of_absurd_length_is_refused() -> None:
    subsections = b"\x05" + str8("configuration/capabilities") + b"\0\0\0\x01\xff\xff\xff\xff"
    assert refusal(Raw(subsections=subsections).file()).field == "capabilities"


def test_repeated_subsection_is_refused() -> None:
    bits = b"\x05" + str8("configuration/target-page-bits") + b"\0\0\0\x01\0\0\0\x0c"
    assert "duplicate subsection" in str(refusal(Raw(subsections=bits + bits).file()))


def test_subsection_of_another_version_is_refused() -> None:
    bits = b"\x05" + str8("configuration/target-page-bits") + b"\0\0\0\x02\0\0\0\x0c"
    assert "version 2" in str(refusal(Raw(subsections=bits).file()))


def test_unknown_subsection_is_not_supported() -> None:
    other = b"\x05" + str8("configuration/other") + b"\0\0\0\x01"
    with pytest.raises(NotSupported, match="configuration/other"):
        parse(Raw(subsections=other).file())


@pytest.mark.parametrize("capabilities", [(), ("x-ignore-shared",)])
def test_sequential_stream_is_not_supported(capabilities: tuple[str, ...]) -> None:
    with pytest.raises(NotSupported, match="sequential"):
        parse(Raw(capabilities=capabilities, subsections=None if capabilities else b"").file())


def test_stream_without_ram_end_is_refused() -> None:
    assert "did not finish" in str(refusal(Raw(ram_end=b"").file()))


def test_file_that_stops_after_the_head_is_refused() -> None:
    head = encode_head("pc", [BlockSpec("pc.ram", 65536)])
    error = refusal(file_of(head, b"").cut(len(head.pieces[0].data)))
    assert "did not finish" in str(error)
    assert error.block == "pc.ram"


def test_file_with_its_full_size_but_no_tail_is_refused() -> None:
    head = encode_head("pc", [BlockSpec("pc.ram", 65536)])
    source = Sparse([(piece.offset, piece.data) for piece in head.pieces], head.tail_offset + 500)
    assert "RAM" in str(refusal(source))


def test_file_that_stops_after_start_is_refused() -> None:
    head = encode_head("pc", [BlockSpec("pc.ram", 65536)])
    assert "no RAM END" in str(refusal(file_of(head, encode_tail()[:13])))


def test_file_that_stops_after_end_is_refused() -> None:
    head = encode_head("pc", [BlockSpec("pc.ram", 65536)])
    tail = encode_tail(description=b"{}")
    assert "end-of-stream" in str(refusal(file_of(head, tail[: -len(b"\0\x06\0\0\0\x02{}")])))


@pytest.mark.parametrize("length", range(len(encode_tail()) - 1))
def test_no_cut_tail_passes_for_a_stream_with_a_description(length: int) -> None:
    head = encode_head("pc", [BlockSpec("pc.ram", 65536)])
    try:
        stream = parse(file_of(head, encode_tail()[:length]))
    except SnapshotError:
        return
    assert stream.description is None


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (Raw(name=b""), "name"),
        (Raw(length=0), "length"),
        (Raw(length=4097), "length"),
        (Raw(length=131072), "length"),
        (Raw(length=1 << 63, total=(1 << 63) - 4096), "length"),
        (Raw(header_version=0), "version"),
        (Raw(header_version=2), "version"),
        (Raw(page_size=0), "page_size"),
        (Raw(page_size=512), "page_size"),
        (Raw(page_size=3000), "page_size"),
        (Raw(page_size=1 << 17), "page_size"),
        (Raw(page_size=1 << 63), "page_size"),
        (Raw(pages_offset=(1 << 20) + 1024), "pages_offset"),
        (Raw(pages_offset=0), "pages_offset"),
        (Raw(pages_offset=(1 << 63) - 4096), "pages_offset"),
        (Raw(pages_offset=(1 << 64) - 4096), "pages_offset"),
        (Raw(bitmap_offset=0, pages_offset=0), "pages_offset"),
        (Raw(bitmap_offset=(1 << 64) - 1), "bitmap_offset"),
        (Raw(bitmap_offset=1 << 40), "bitmap_offset"),
        (Raw(capabilities=SHARED, gpa=words(0), bitmap_offset=0), None),
        (Raw(capabilities=SHARED, gpa=words(0), pages_offset=0), "pages_offset"),
    ],
)
def test_bad_field_of_a_block_is_named(raw: Raw, field: str | None) -> None:
    error = refusal(raw.file())
    assert error.field == field
    assert error.offset is not None
    if raw.name:
        assert error.block == "pc.ram"


@pytest.mark.parametrize("total", [4096, 65536 - 4096])
def test_blocks_longer_than_the_total_are_refused(total: int) -> None:
    error = refusal(Raw(total=total).file())
    assert (error.block, error.field) == ("pc.ram", "length")


def test_block_where_the_total_is_zero_is_refused() -> None:
    assert "only its end mark" in str(refusal(Raw(total=0).file()))


def test_blocks_shorter_than_the_total_are_refused() -> None:
    # What follows the last block is read as one more, and does not make sense as such.
    assert "without a name" in str(refusal(Raw(total=65536 + 4096).file()))


@pytest.mark.parametrize("word", [65536, 65536 | 0x0C, 65536 | 0x10, 1 << 63 | 4, 0x204])
def test_ram_that_starts_without_a_size_is_refused(word: int) -> None:
    source = Raw().file()
    at = source.pieces[0][1].index(words(65536 | 4))
    assert refusal(source.patched(at, words(word))).field == "total"


def test_repeated_block_name_is_refused() -> None:
    head = encode_head("pc", [BlockSpec("a1", 4096), BlockSpec("a2", 4096)])
    source = file_of(head, encode_tail())
    error = refusal(source.patched(head.pieces[1].offset + 1, b"a1"))
    assert (error.block, error.field) == ("a1", "name")


def test_page_sizes_that_differ_between_blocks_are_refused() -> None:
    head = encode_head("pc", [BlockSpec("a1", 4096), BlockSpec("a2", 4096)])
    page_size = head.blocks[1].header_offset + 4
    error = refusal(file_of(head, encode_tail()).patched(page_size, words(1024)))
    assert (error.block, error.field) == ("a2", "page_size")


@pytest.mark.parametrize("bits", [0, 10, 13, 64, 0xFFFFFFFF])
def test_page_size_that_contradicts_the_configuration_is_refused(bits: int) -> None:
    head = encode_head("virt", [BlockSpec("ram", 65536)], target_page_bits=12)
    source = file_of(head, encode_tail())
    at = head.pieces[0].data.index(struct.pack(">II", 1, 12)) + 4
    assert refusal(source.patched(at, struct.pack(">I", bits))).field == "page_size"


@pytest.mark.parametrize(
    "bitmap_offset",
    [
        0,
        20,
        (1 << 20) - 1,
        1 << 20,
        (1 << 20) + 65535,
        (1 << 20) + 65536 - 1,
        (1 << 20) + 65536,
        (1 << 20) + 65536 + 20,
    ],
)
def test_bitmap_over_anything_else_is_refused(bitmap_offset: int) -> None:
    assert "overlap" in str(refusal(Raw(bitmap_offset=bitmap_offset).file()))


def test_bitmap_over_the_description_is_refused() -> None:
    source = Raw(devices=full(2, "cpu", b"abc")[:-1] + b"!", description=described()).file()
    at = source.pieces[0][1].index(words(4096)) + 8
    assert "overlap" in str(refusal(source.patched(at, words(source.size - 10))))


def test_bitmap_before_the_stream_is_refused() -> None:
    head = encode_head("pc", [BlockSpec("a", 4096)], offset=4096)
    source = file_of(head, encode_tail()).patched(head.blocks[0].header_offset + 12, words(100))
    assert "the data before the stream" in str(refusal(source, 4096))


def test_bitmap_over_the_pages_of_another_block_is_refused() -> None:
    head = encode_head("pc", [BlockSpec("a", 8192), BlockSpec("b", 4096)])
    source = file_of(head, encode_tail())
    overlapping = source.patched(
        head.blocks[1].header_offset + 12, words(head.blocks[0].pages_offset + 4096)
    )
    error = refusal(overlapping)
    assert "'a'" in str(error) and error.block == "b"


def test_file_cut_inside_pages_is_refused_with_the_block() -> None:
    error = refusal(snapshot().cut((1 << 20) + 4096))
    assert error.block == "pc.ram"
    assert "cut short" in str(error)


def test_ram_of_another_version_is_refused() -> None:
    assert refusal(Raw(ram_version=5).file()).field == "version"


def test_second_ram_is_refused() -> None:
    again = start(9, "ram", 4, words(4) + RAM_EOS)
    assert "started twice" in str(refusal(Raw(inside=again).file()))


def test_section_id_started_twice_is_refused() -> None:
    again = start(1, "dirty-bitmap", 1, b"\x01")
    assert "started twice" in str(refusal(Raw(inside=again).file()))


def test_part_without_start_is_refused() -> None:
    assert refusal(Raw(inside=part(5, RAM_EOS)).file()).field == "section id"


def test_part_after_end_is_refused() -> None:
    assert refusal(Raw(devices=part(1, RAM_EOS)).file()).field == "section id"


@pytest.mark.parametrize("word", [0, 0x02, 0x08, 0x30, 0x40, 0x80, 0x100, 0x200, 0x1010])
def test_page_records_in_a_mapped_ram_section_are_refused(word: int) -> None:
    assert "only its end mark" in str(refusal(Raw(inside=part(1, words(word))).file()))


@pytest.mark.parametrize("footer", [b"\x7e\0\0\0\x02", b"\x7d\0\0\0\x01", b"\x03\0\0\0\x01"])
def test_wrong_footer_is_refused(footer: bytes) -> None:
    inside = part(1, RAM_EOS)[:-5] + footer
    assert refusal(Raw(inside=inside).file()).field == "footer"


@pytest.mark.parametrize("kind", [0x05, 0x06, 0x07, 0x09, 0x7E, 0xFF])
def test_unknown_element_is_refused(kind: int) -> None:
    assert f"{kind:#04x}" in str(refusal(Raw(inside=bytes([kind])).file()))


def test_packaged_command_is_not_supported() -> None:
    with pytest.raises(NotSupported, match="packaged"):
        parse(Raw(inside=command(7, b"\0\0\0\0")).file())


def test_command_longer_than_the_file_is_refused() -> None:
    inside = struct.pack(">BHH", 8, 11, 0xFFFF)
    assert "ends inside" in str(refusal(Raw(inside=inside, description=None).file()))


def test_device_before_the_end_of_ram_that_cannot_be_passed_is_refused() -> None:
    broken = full(5, "early", b"abc")[:-1] + b"!"
    error = refusal(Raw(inside=broken, description=None).file())
    assert "'early'" in str(error)


def test_search_for_footers_is_bounded() -> None:
    broken = full(5, "early", b"\x7e\0\0\0\x05" * 400_000)[:-1] + b"!"
    assert "'early'" in str(refusal(Raw(inside=broken, description=None).file()))


def test_end_of_stream_before_the_description_is_refused() -> None:
    source = Raw(devices=b"\0" + full(2, "cpu", b"abc"), description=described(device("cpu", 3)))
    assert "were lost" in str(refusal(source.file()))


def test_more_sections_than_the_limit_are_refused() -> None:
    inside = command(2, b"") * (LISTED_MAX + 1)
    assert "more than" in str(refusal(Raw(inside=inside).file()))


def test_end_of_ram_without_start_is_refused() -> None:
    assert refusal(Raw(before=end(1, RAM_EOS)).file()).field == "section id"


VALID = Raw(
    before=command(3),
    inside=start(2, "dirty-bitmap", 1, b"\x01") + part(1, RAM_EOS) + part(2, b"\x01"),
    devices=end(2, b"\x01") + full(3, "cpu", b"abcdef") + full(4, "timer", b"t" * 24),
    description=described(device("cpu", 6), device("timer", 24)),
).file()
FRAMING = [start + k for start, piece in VALID.pieces for k in range(len(piece))]


def test_the_stream_that_is_mutated_below_is_whole() -> None:
    assert parse(VALID).complete


def parses_or_refuses(source: Sparse) -> None:
    try:
        stream = parse(source)
    except (SnapshotError, NotSupported):
        return
    assert stream.total_ram == sum(block.length for block in stream.blocks)
    assert stream.end <= source.size
    for block in stream.blocks:
        assert block.external or block.pages_end <= source.size
    assert source.bytes_read < 1 << 22


@settings(max_examples=1000)
@given(st.lists(st.tuples(st.sampled_from(FRAMING), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_refused_or_harmless(changes: list[tuple[int, int]]) -> None:
    source = VALID
    for offset, value in changes:
        source = source.patched(offset, bytes([value]))
    parses_or_refuses(source)


@given(st.integers(0, VALID.size))
def test_cut_files_are_refused_or_said_to_be_incomplete(size: int) -> None:
    source = VALID.cut(size)
    try:
        stream = parse(source)
    except (SnapshotError, NotSupported):  # cut before its capabilities it looks sequential
        return
    # A file that ends with its end-of-stream byte is whole: the description may be missing.
    described = parse(VALID).description_offset
    assert size in (VALID.size, described) or not stream.complete


@given(st.sampled_from(FRAMING), st.binary(min_size=8, max_size=8))
def test_overwritten_words_are_refused_or_harmless(offset: int, data: bytes) -> None:
    parses_or_refuses(VALID.patched(offset, data))


@given(st.binary(max_size=200))
def test_noise_after_the_configuration_is_refused(noise: bytes) -> None:
    head = VALID.pieces[0][1][:62]
    refusal(Sparse([(0, head + noise)]))
