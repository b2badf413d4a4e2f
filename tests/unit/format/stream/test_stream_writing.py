"""What the writer puts where."""

import json

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.wire import MAGIC
from pyqmigrate.format.stream.writer import encode_head, encode_tail

EXAMPLE = [
    BlockSpec("pc.ram", 0x4000000),
    BlockSpec("/rom@etc/acpi/tables", 0x20000),
    BlockSpec("pc.bios", 0x40000),
    BlockSpec("pc.rom", 0x20000),
    BlockSpec("/rom@etc/table-loader", 0x1000),
    BlockSpec("/rom@etc/acpi/rsdp", 0x1000),
]


def hexed(text: str) -> bytes:
    """Bytes from hex digits and quoted ASCII, as in a dump."""
    parts = text.split('"')
    return b"".join(
        part.encode() if index % 2 else bytes.fromhex(part) for index, part in enumerate(parts)
    )


def test_head_of_a_pc_is_byte_for_byte_that_of_qemu() -> None:
    head = encode_head("pc-i440fx-10.0", EXAMPLE)
    assert [piece.offset for piece in head.pieces] == [
        0,
        0x4100000,
        0x4220000,
        0x4340000,
        0x4420000,
        0x4501000,
    ]
    assert head.pieces[0].data == hexed(
        '5145564D 00000003 07 0000000E "pc-i440fx-10.0"'
        '05 1A "configuration/capabilities" 00000001 00000001 0A "mapped-ram"'
        '01 0052414D 03 "ram" 00000000 00000004 0000000004082004'
        '06 "pc.ram" 0000000004000000'
        "00000001 0000000000001000 000000000000008E 0000000000100000"
    )
    assert head.pieces[1].data == hexed(
        '14 "/rom@etc/acpi/tables" 0000000000020000'
        "00000001 0000000000001000 0000000004100039 0000000004200000"
    )
    assert head.pieces[2].data == hexed(
        '07 "pc.bios" 000000000004000000000001 0000000000001000 000000000422002C 0000000004300000'
    )
    assert [block.pages_offset for block in head.blocks[3:]] == [0x4400000, 0x4500000, 0x4600000]
    assert head.tail_offset == 0x4601000


def test_tail_is_byte_for_byte_that_of_qemu() -> None:
    tail = encode_tail(sections=b"SECTIONS", description=b"{}", switchover_start=True)
    assert tail == hexed(
        "0000000000000010 7E0052414D"
        "02 0052414D 0000000000000010 7E0052414D"
        "08 000B 0000"
        "03 0052414D 0000000000000010 7E0052414D"
        '"SECTIONS" 00 06 00000002 "{}"'
    )


def test_switchover_command_is_left_out_by_default() -> None:
    assert b"\x08\x00\x0b" not in encode_tail()


def test_stream_without_devices_is_described_as_such() -> None:
    text = encode_tail(page_size=1024).split(b"\0\x06", 1)[1][4:]
    assert json.loads(text) == {"page_size": 1024, "devices": []}


def test_sections_without_description_get_none() -> None:
    assert encode_tail(sections=b"SECTIONS").endswith(b"SECTIONS\0")


def test_first_piece_starts_at_the_offset_with_the_magic() -> None:
    first = encode_head("pc", EXAMPLE, offset=0x1234).pieces[0]
    assert first.offset == 0x1234
    assert first.data.startswith(MAGIC)


@pytest.mark.parametrize(
    ("offset", "pages"), [(0x1000, 0x100000), (0x100000, 0x200000), (0x500001, 0x600000)]
)
def test_pages_are_aligned_in_the_file_not_in_the_stream(offset: int, pages: int) -> None:
    assert encode_head("pc", EXAMPLE, offset=offset).blocks[0].pages_offset == pages


def test_page_bits_are_before_the_capabilities() -> None:
    data = encode_head("virt", [BlockSpec("ram", 4096)], target_page_bits=12).pieces[0].data
    expected = hexed('05 1E "configuration/target-page-bits" 00000001 0000000C 05 1A')
    assert expected in data


def test_page_bits_are_left_out_by_default() -> None:
    assert b"target-page-bits" not in encode_head("pc", EXAMPLE).pieces[0].data


def test_stream_without_blocks_has_a_head_and_a_tail() -> None:
    head = encode_head("none", [])
    assert len(head.pieces) == 1
    assert head.tail_offset == len(head.pieces[0].data)


@pytest.mark.parametrize(
    ("specs", "options", "message"),
    [
        ([BlockSpec("a", 4096), BlockSpec("a", 4096)], {}, "duplicate block name"),
        ([BlockSpec("a", 4096), BlockSpec("b", 4096, 1024)], {}, "pages of 1024"),
        ([BlockSpec("a", 4096)], {"target_page_bits": 10}, "pages of 4096"),
        ([BlockSpec("a", 4096)], {"target_page_bits": 9}, "target_page_bits"),
        ([BlockSpec("a", 4096)], {"target_page_bits": -1}, "target_page_bits"),
        ([BlockSpec("a", 4096)], {"offset": -1}, "must not be negative"),
        ([BlockSpec("a", 1 << 62), BlockSpec("b", 1 << 62)], {}, "do not fit in a file"),
    ],
)
def test_blocks_that_do_not_fit_together_are_refused(
    specs: list[BlockSpec], options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        encode_head("pc", specs, **options)


@pytest.mark.parametrize("machine", ["a" * 4097, "\ud800"])
def test_machine_type_that_cannot_be_written_is_refused(machine: str) -> None:
    with pytest.raises(UsageError):
        encode_head(machine, [])
