"""The header of an increment round-trips, and anything else is rejected."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import SnapshotError, SnapshotTruncated, UsageError
from pyqmigrate.format.increment import (
    HEADER_MAX,
    MAGIC,
    IncrementHeader,
    base_location,
    base_path,
    is_increment,
)
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.mapped_ram import OFFSET_MAX, PAGE_SIZES
from tests.harness.examples import some

MIB = 1 << 20
SEAL = bytes(range(16))
HEADER = IncrementHeader(
    "base.mapped",
    SnapshotId(5 * MIB, 1_700_000_000_123_456_789, SEAL),
    (BlockSpec("pc.ram", 4 * MIB), BlockSpec("vga.vram", MIB)),
    1_800_000_000_000_000_001,
    "pc-q35-10.0",
    8192,
)

names = st.binary(min_size=1, max_size=255).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
paths = names.filter(lambda name: "\0" not in name)
offsets = st.integers(0, OFFSET_MAX)
times = st.integers(-OFFSET_MAX, OFFSET_MAX)


@st.composite
def headers(draw: st.DrawFn) -> IncrementHeader:
    seal = draw(st.none() | st.binary(min_size=16, max_size=16))
    blocks = []
    for name in draw(st.lists(names, max_size=4, unique=True)):
        page_size = draw(st.sampled_from(PAGE_SIZES))
        blocks.append(BlockSpec(name, draw(st.integers(1, 1 << 40)) * page_size, page_size))
    return IncrementHeader(
        draw(paths),
        SnapshotId(draw(offsets), draw(times), seal),
        tuple(blocks),
        draw(times),
        draw(st.just("") | names),
        draw(st.integers(0, sum(block.length for block in blocks))),
        draw(st.integers(1, 1 << 20)) * MIB,
    )


class Bytes:
    """A file of these bytes, with zeros up to its stream."""

    def __init__(self, data: bytes, size: int | None = None) -> None:
        self.data = data
        self.size = len(data) if size is None else size

    def read_at(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def read(data: bytes, size: int = OFFSET_MAX) -> IncrementHeader:
    return IncrementHeader.read(Bytes(data, size))


def with_json(text: bytes, offset: int = MIB) -> bytes:
    """A header of this JSON, whose digest is right."""
    fixed = struct.pack("<IIQ", 1, len(text), offset)
    return MAGIC + fixed + xxhash.xxh3_128_digest(fixed + text) + text


def changed(*keys: str | int, to: object) -> bytes:
    """HEADER with another value at a place of its JSON; ``...`` takes the key away."""
    value = json.loads(HEADER.encode(magic=True)[40:])
    inner: Any = value
    for key in keys[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = to
    return with_json(json.dumps(value).encode())


@some
@given(headers())
def test_what_is_written_is_read(header: IncrementHeader) -> None:
    data = header.encode(magic=True)
    assert is_increment(data[:8])
    assert read(data, header.stream_offset) == header
    assert len(data) <= header.stream_offset


def test_without_its_magic_it_is_not_an_increment_and_no_qemu_takes_either() -> None:
    unfinished, whole = HEADER.encode(magic=False), HEADER.encode(magic=True)
    assert MAGIC + unfinished[8:] == whole
    assert unfinished[:8] == bytes(8)
    for start in (unfinished, whole):
        assert not start.startswith((b"QEVM", b"LibvirtQ"))
    with pytest.raises(SnapshotError, match=r"unfinished one .*field magic, file offset 0x0"):
        read(unfinished)


def test_the_stream_follows_at_a_multiple_of_1_mib() -> None:
    assert HEADER.stream_offset == MIB
    many = tuple(BlockSpec(f"{n:0250}", 4096) for n in range(5000))
    with pytest.raises(UsageError, match="stream cannot start"):
        replace(HEADER, blocks=many)
    assert read(replace(HEADER, blocks=many, stream_offset=2 * MIB).encode(magic=True)).blocks


@pytest.mark.parametrize("size", [0, 3, 8, 39, 40, 100])
def test_a_header_that_is_cut_off_is_refused(size: int) -> None:
    data = HEADER.encode(magic=True)[:size]
    with pytest.raises(SnapshotError):
        read(data, size)


def test_a_file_that_ends_before_its_stream_is_truncated() -> None:
    with pytest.raises(SnapshotTruncated, match="starts at 0x100000"):
        read(HEADER.encode(magic=True), MIB - 1)


@some
@given(st.integers(0, 8 * len(HEADER.encode(magic=True)) - 1))
def test_a_flipped_bit_is_found(bit: int) -> None:
    data = bytearray(HEADER.encode(magic=True))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SnapshotError):
        read(bytes(data))


@some
@given(st.binary(max_size=300))
def test_any_bytes_are_a_header_or_refused(data: bytes) -> None:
    for text in (data, with_json(data)):
        with pytest.raises(SnapshotError):
            read(text)


@pytest.mark.parametrize(
    ("position", "value", "field"),
    [
        (8, struct.pack("<I", 2), "version"),
        (12, struct.pack("<I", HEADER_MAX + 1), "length"),
        (12, struct.pack("<I", 0), "length"),
        (16, struct.pack("<Q", MIB + 1), "stream offset"),
        (16, struct.pack("<Q", 0), "stream offset"),
        (16, struct.pack("<Q", 1 << 63), "stream offset"),
    ],
)
def test_a_number_out_of_its_range_is_named(position: int, value: bytes, field: str) -> None:
    data = bytearray(HEADER.encode(magic=True))
    data[position : position + len(value)] = value
    with pytest.raises(SnapshotError) as raised:
        read(bytes(data))
    assert (raised.value.field, raised.value.offset) == (field, position)


@pytest.mark.parametrize(
    ("keys", "value", "field"),
    [
        (("base",), ..., "base"),
        (("base",), "base.mapped", "base"),
        (("base", "path"), ..., "base.path"),
        (("base", "path"), "", "base.path"),
        (("base", "path"), "a\0b", "base.path"),
        (("base", "path"), "a" * 4097, "base.path"),
        (("base", "path"), "\ud800", "base.path"),
        (("base", "size"), -1, "base.size"),
        (("base", "size"), True, "base.size"),
        (("base", "size"), 1 << 63, "base.size"),
        (("base", "mtime_ns"), "now", "base.mtime_ns"),
        (("base", "seal"), "zz", "base.seal"),
        (("base", "seal"), 7, "base.seal"),
        (("base", "seal"), "00", "base.seal"),
        (("blocks",), ..., "blocks"),
        (("blocks",), [{}] * 65537, "blocks"),
        (("blocks", 0), 4, "blocks[0]"),
        (("blocks", 1, "name"), ..., "blocks[1].name"),
        (("blocks", 1, "name"), "a" * 256, "blocks[1].name"),
        (("blocks", 1, "name"), "pc.ram", "blocks"),
        (("blocks", 1, "length"), 1.5, "blocks[1].length"),
        (("blocks", 1, "length"), 0, "blocks[1]"),
        (("blocks", 1, "length"), 4097, "blocks[1]"),
        (("blocks", 1, "page_size"), 5000, "blocks[1]"),
        (("created_ns",), ..., "created_ns"),
        (("machine",), 8, "machine"),
        (("changed_bytes",), 5 * MIB + 1, "changed_bytes"),
        (("changed_bytes",), -1, "changed_bytes"),
    ],
)
def test_a_value_that_cannot_be_is_named(
    keys: tuple[str | int, ...], value: object, field: str
) -> None:
    with pytest.raises(SnapshotError) as raised:
        read(changed(*keys, to=value))
    assert raised.value.field == field


@pytest.mark.parametrize("text", [b"[]", b"77", b"nonsense", b"[" * 100_000])
def test_what_is_not_an_object_is_refused(text: bytes) -> None:
    with pytest.raises(SnapshotError) as raised:
        read(with_json(text))
    assert raised.value.field == "json"


def test_header_that_would_be_longer_as_it_is_written_here_is_refused() -> None:
    blocks = [
        {"name": f"{number:04}" + "\u00fc" * 120, "length": 4096, "page_size": 4096}
        for number in range(2500)
    ]
    value = json.loads(HEADER.encode(magic=True)[40:]) | {"blocks": blocks, "changed_bytes": 0}
    text = json.dumps(value, ensure_ascii=False).encode()
    assert len(text) < MIB - 40 < len(json.dumps(value))
    with pytest.raises(SnapshotError) as raised:
        read(with_json(text))
    assert raised.value.field == "json"


def test_further_keys_are_stepped_over() -> None:
    assert read(changed("later", to=[1])) == HEADER


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks": (BlockSpec("a", 4096), BlockSpec("a", 4096))},
        {"machine": "x" * 256},
        {"changed_bytes": 1 << 40},
        {"stream_offset": 4096},
        {"base_path": ""},
        {"base": SnapshotId(1, 1, b"short")},
    ],
)
def test_a_header_that_could_not_be_read_is_not_written(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot have this header"):
        replace(HEADER, **changes)


def test_a_base_beside_the_increment_is_named_alone() -> None:
    assert base_path("/snap/base", "/snap/inc") == "base"
    assert base_path("/snap/base", "/other/inc") == "/snap/base"
    assert base_path("base", "inc") == "base"
    assert base_path("base", "/x/inc") == str(Path.cwd() / "base")
    assert base_location("base", "/moved/inc") == Path("/moved/base")
    assert base_location("/snap/base", "/moved/inc") == Path("/snap/base")


@some
@given(paths.filter(lambda name: "/" not in name and name not in (".", "..")))
def test_any_name_leads_back_to_its_file(name: str) -> None:
    for base in (f"/snap/{name}", f"/other/{name}"):
        path = base_path(base, "/snap/inc")
        header = replace(HEADER, base_path=path)
        assert (
            os.fspath(base_location(read(header.encode(magic=True)).base_path, "/snap/inc")) == base
        )


@pytest.mark.parametrize(
    ("size", "mtime_ns", "seal", "fault"),
    [
        (5 * MIB, HEADER.base.mtime_ns, None, None),
        (5 * MIB, HEADER.base.mtime_ns, SEAL, None),
        (5 * MIB, 7, SEAL, None),
        (5 * MIB, 7, None, "modified"),
        (5 * MIB, HEADER.base.mtime_ns, bytes(16), "seal"),
        (1, HEADER.base.mtime_ns, SEAL, "1 bytes"),
    ],
)
def test_a_base_is_known_by_size_and_seal_or_time(
    size: int, mtime_ns: int, seal: bytes | None, fault: str | None
) -> None:
    found = HEADER.base.differs_from(SnapshotId(size, mtime_ns, seal))
    assert found is None if fault is None else found is not None and fault in found
