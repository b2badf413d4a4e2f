"""The framing of sequential streams, written and read."""

from __future__ import annotations

import json

import pytest

from pyqmigrate.errors import NotSupported, SnapshotError, UsageError
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.sequential import (
    RAM_EOS,
    SequentialStream,
    SequentialStreamReader,
    encode_head,
)
from pyqmigrate.format.stream.wire import SectionKind
from pyqmigrate.format.stream.writer import RAM_SECTION_ID, encode_end, encode_part_header
from tests.harness.stream_builders import (
    EOF,
    Sparse,
    blocks,
    capabilities,
    command,
    configured,
    described,
    described_as,
    device,
    end,
    entry,
    full,
    part,
    snapshot,
    str8,
    words,
)
from tests.harness.stream_builders import RAM_EOS as MARK

SPECS = [BlockSpec("pc.ram", 0x4000000), BlockSpec("pc.bios", 0x40000)]


ONE = blocks(entry("pc.ram", 8192), total=8192)
ENDED = end(1, MARK) + EOF + described_as(described())


def walk(data: bytes, *, page_size: int | None = None, offset: int = 0) -> SequentialStreamReader:
    """A walk whose records are one end mark."""
    walk = SequentialStreamReader(
        Sparse([(0, data)]), offset, lambda at: at + len(MARK), page_size=page_size
    )
    walk.read_head()
    return walk


def stream(data: bytes, **options: int) -> SequentialStream:
    return walk(data, **options).stream()


def refusal(data: bytes, **options: int) -> SnapshotError:
    with pytest.raises(SnapshotError) as caught:
        stream(data, **options)
    return caught.value


def test_head_is_that_of_qemu_but_for_the_id_of_ram() -> None:
    assert encode_head("pc-i440fx-10.0", SPECS) == (
        bytes.fromhex("5145564D 00000003 07 0000000E")
        + b"pc-i440fx-10.0"
        + bytes.fromhex("01 0052414d 03 72616d 00000000 00000004 0000000004040004")
        + b"\x06pc.ram"
        + bytes.fromhex("0000000004000000")
        + b"\x07pc.bios"
        + bytes.fromhex("0000000000040000")
        + bytes.fromhex("0000000000000010 7E0052414D")
    )


def test_page_bits_are_stated_without_capabilities() -> None:
    head = encode_head("virt-10.0", SPECS, target_page_bits=12)
    parsed = walk(head)
    assert parsed.page_size == 4096
    assert b"configuration/target-page-bits" in head
    assert b"capabilities" not in head


@pytest.mark.parametrize(
    "specs",
    [
        [BlockSpec("a", 4096), BlockSpec("a", 4096)],
        [BlockSpec("a", 4096), BlockSpec("b", 4096, 1024)],
        [BlockSpec("a", 1 << 62), BlockSpec("b", 1 << 62)],
    ],
)
def test_blocks_that_do_not_fit_together_are_refused(specs: list[BlockSpec]) -> None:
    with pytest.raises(UsageError):
        encode_head("pc", specs)


def test_what_is_written_is_read() -> None:
    device_section = full(7, "timer", b"12345")
    data = (
        encode_head("pc", SPECS)
        + encode_part_header()
        + RAM_EOS
        + encode_end(
            sections=device_section,
            description=described(device("timer", 5)),
            switchover_start=True,
            page_size=4096,
        )
    )
    got = stream(data)
    assert got.machine == "pc"
    assert got.capabilities == ()
    assert [(b.name, b.length, b.gpa) for b in got.blocks] == [
        ("pc.ram", 0x4000000, None),
        ("pc.bios", 0x40000, None),
    ]
    assert [section.kind for section in got.sections] == [
        SectionKind.START,
        SectionKind.PART,
        SectionKind.COMMAND,
        SectionKind.END,
        SectionKind.FULL,
    ]
    timer = got.sections[-1]
    assert data[timer.body_offset : timer.body_offset + timer.body_length] == b"12345"
    assert got.complete and not got.opaque_tail
    assert got.end == len(data)


def test_records_are_read_in_every_part_and_in_end() -> None:
    seen = []
    data = configured() + ONE + part(1, MARK) + command(11) + part(1, MARK) + ENDED

    def read(at: int) -> int:
        seen.append(at)
        return at + 8

    walk = SequentialStreamReader(Sparse([(0, data)]), 0, read)
    walk.read_head()
    walk.stream()
    assert [data[at : at + 8] for at in seen] == [MARK] * 3


def test_guest_address_is_in_entries_with_ignore_shared() -> None:
    head = configured(capabilities("x-ignore-shared"))
    data = head + blocks(entry("a", 4096, words(0x1000)), entry("b", 4096, words(0)), total=8192)
    got = stream(data + ENDED)
    assert [block.gpa for block in got.blocks] == [0x1000, 0]
    assert got.ignore_shared


def test_guest_addresses_are_written_with_ignore_shared() -> None:
    specs = [BlockSpec("a", 4096, address=0x1000), BlockSpec("b", 4096, address=(1 << 64) - 1)]
    ended = end(RAM_SECTION_ID, MARK) + EOF
    got = stream(encode_head("pc", specs, ignore_shared=True) + ended)
    assert [block.gpa for block in got.blocks] == [0x1000, (1 << 64) - 1]
    for wrong in (-1, 1 << 64):
        with pytest.raises(UsageError, match="address"):
            BlockSpec("a", 4096, address=wrong)


def test_stream_with_an_offset_is_read_there() -> None:
    got = stream(b"x" * 77 + configured() + ONE + ENDED, offset=77)
    assert got.blocks[0].entry_offset == 77 + len(configured()) + 5 + 4 + 8 + 8


def test_mapped_ram_stream_is_of_another_kind() -> None:
    walk = SequentialStreamReader(snapshot(), 0, lambda at: at)
    with pytest.raises(NotSupported, match="mapped-ram"):
        walk.read_head()


PAGES = {1024: b"\x00\x00\x00\x0a", 65536: b"\x00\x00\x00\x10"}


@pytest.mark.parametrize("size", PAGES)
def test_page_size_comes_from_the_configuration_first(size: int) -> None:
    bits = b"\x05" + str8("configuration/target-page-bits") + b"\x00\x00\x00\x01" + PAGES[size]
    one = blocks(entry("pc.ram", 65536), total=65536)
    assert stream(configured(bits) + one + ENDED).page_size == size


def test_page_size_comes_from_the_description_next() -> None:
    text = json.dumps({"page_size": 8192, "devices": []}).encode()
    data = configured() + ONE + end(1, MARK) + EOF + described_as(text)
    assert stream(data).page_size == 8192
    assert stream(data, page_size=8192).page_size == 8192
    assert refusal(data, page_size=4096).field == "page_size"


def test_page_size_is_the_caller_s_where_none_is_stated() -> None:
    data = configured() + ONE + end(1, MARK) + EOF
    assert stream(data, page_size=2048).page_size == 2048
    assert stream(data).page_size == 4096


@pytest.mark.parametrize("size", [0, 512, 4095, 131072, -4096])
def test_page_size_that_is_none_is_refused(size: int) -> None:
    text = json.dumps({"page_size": size, "devices": []}).encode()
    data = configured() + ONE + end(1, MARK) + EOF + described_as(text)
    assert refusal(data).field == "page_size"


@pytest.mark.parametrize(
    ("entries", "total", "field"),
    [
        ([entry("a", 4096), entry("a", 4096)], 8192, "name"),
        ([entry("", 4096)], 4096, "name"),
        ([entry("a", 4095)], 4095 & ~7, "length"),
        ([entry("a", 0)], 4096, "length"),
        ([entry("a", 8192)], 4096, "length"),
        ([entry("a", 1 << 63)], 4096, "length"),
    ],
)
def test_bad_block_list_is_refused(entries: list[bytes], total: int, field: str) -> None:
    total = total // 1024 * 1024 or 1024
    error = refusal(configured() + blocks(*entries, total=total) + ENDED)
    assert error.field == field
    assert error.offset is not None


def test_list_that_goes_on_after_its_total_is_refused() -> None:
    data = configured() + blocks(entry("a", 4096), entry("b", 4096), total=4096) + ENDED
    assert "end mark" in str(refusal(data))


def test_stream_without_ram_end_is_refused() -> None:
    assert "did not finish" in str(refusal(configured() + ONE + part(1, MARK) + EOF))


def test_stream_without_ram_is_refused() -> None:
    assert "did not finish" in str(refusal(configured() + EOF))


def test_stream_that_is_cut_anywhere_is_refused_or_incomplete() -> None:
    data = configured() + ONE + part(1, MARK) + ENDED
    for size in range(len(data) - len(described()) - 5):
        refusal(data[:size])


def test_device_state_that_cannot_be_walked_is_opaque() -> None:
    """Without description and footer nobody knows where the section ends."""
    data = configured() + ONE + end(1, MARK) + full(9, "odd", b"\xff" * 40)[:-5]
    got = stream(data)
    assert got.opaque_tail and not got.complete
    assert [section.kind for section in got.sections] == [SectionKind.START, SectionKind.END]
