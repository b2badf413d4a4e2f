"""The description: found from the end, parsed with care, asked for lengths."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import SnapshotError, UsageError
from pyqmigrate.format.cursor import Cursor
from pyqmigrate.format.stream.description import (
    DESCRIPTION_MAX,
    body_lengths,
    encode,
    no_devices,
    read,
    read_from_end,
)
from tests.harness.stream_builders import Sparse


def ending(text: bytes, before: bytes = b"stream") -> Sparse:
    return Sparse([(0, before + b"\0" + encode(text))])


def padded(size: int) -> bytes:
    """JSON of exactly ``size`` bytes."""
    return b'{"a": "' + b"x" * (size - 9) + b'"}'


@pytest.mark.parametrize("size", [2 + 9, 0x7B, 0x100, 0x7B7B, 0x10000, 0x2B7B2B, 0x1000000])
def test_description_is_found_whatever_bytes_its_length_has(size: int) -> None:
    found = read_from_end(ending(padded(size)))
    assert found is not None
    assert (found.offset, found.end) == (7, 12 + size)


def test_description_of_a_length_with_no_zero_byte_is_found() -> None:
    size = 0x1010101
    found = read_from_end(ending(padded(size)))
    assert found is not None and found.end - found.offset == size + 5


def test_objects_inside_do_not_pass_for_the_description() -> None:
    found = read_from_end(ending(b'{"devices": [{"name": "a"}, {"name": "b"}]}'))
    assert found is not None and found.offset == 7


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b"}",
        b"{}",
        b"\0{}",
        b"\0\x06\0\0\0\x03{}",
        b"\0\x07\0\0\0\x02{}",
        b"\x01\x06\0\0\0\x02{}",
        b"\0\x06\0\0\0\x02{}x",
    ],
)
def test_tail_that_is_not_a_description_is_not_one(tail: bytes) -> None:
    assert read_from_end(Sparse([(0, b"stream" + tail)])) is None


def test_search_from_the_end_is_bounded() -> None:
    class NoZeros:
        size = 1 << 50
        bytes_read = 0

        def read_at(self, offset: int, length: int) -> bytes:
            self.bytes_read += length
            return b"}" * length

    source = NoZeros()
    assert read_from_end(source) is None
    assert source.bytes_read <= 2 * DESCRIPTION_MAX


@pytest.mark.parametrize(
    "text", [b'{"a": }', b'{"a": ' + b"[" * 200_000 + b"}", b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_description_that_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(SnapshotError, match="not JSON") as caught:
        read_from_end(ending(text))
    assert caught.value.offset == 7


def test_description_with_too_many_values_is_refused() -> None:
    with pytest.raises(SnapshotError, match="values"):
        read_from_end(ending(b'{"a": [' + b"[]," * 600_000 + b"0]}"))


def test_description_of_absurd_length_is_refused() -> None:
    source = Sparse([(0, b"\x06\xff\xff\xff\xff{}")], 1 << 40)
    with pytest.raises(SnapshotError, match="claims"):
        read(Cursor(source, 0))


def test_description_cut_short_is_refused() -> None:
    with pytest.raises(SnapshotError, match="ends inside"):
        read(Cursor(Sparse([(0, b"\x06\0\0\0\x03{}")]), 0))


def test_description_that_is_not_an_object_is_refused() -> None:
    with pytest.raises(SnapshotError, match="object"):
        read(Cursor(Sparse([(0, encode(b"[]"))]), 0))


def test_description_too_long_to_be_read_is_not_written() -> None:
    with pytest.raises(UsageError):
        encode(bytes(DESCRIPTION_MAX + 1))


def test_last_of_repeated_keys_holds() -> None:
    found = read_from_end(ending(b'{"page_size": 1, "page_size": 2}'))
    assert found is not None and found.value == {"page_size": 2}


def test_description_of_no_devices_has_no_lengths() -> None:
    assert body_lengths(json.loads(no_devices(4096))) == {}


def test_field_sizes_are_multiplied_by_array_lengths() -> None:
    fields = [{"name": "a", "size": 4, "array_len": 3}, {"name": "b", "size": 1, "index": 0}]
    assert body_lengths({"devices": [{"name": "d", "instance_id": 2, "fields": fields}]}) == {
        ("d", 2): 13
    }


def test_struct_field_counts_once() -> None:
    inner = {"vmsd_name": "inner", "fields": [{"name": "x", "size": 8}]}
    fields = [{"name": "s", "type": "struct", "size": 8, "struct": inner}]
    assert body_lengths({"devices": [{"name": "d", "instance_id": 0, "fields": fields}]}) == {
        ("d", 0): 8
    }


def test_subsections_count_with_their_frames() -> None:
    deepest = {"vmsd_name": "d/s/t", "fields": [{"name": "y", "size": 2}]}
    subsection = {"vmsd_name": "d/s", "fields": [], "subsections": [deepest]}
    device = {"name": "d", "instance_id": 0, "fields": [], "subsections": [subsection]}
    assert body_lengths({"devices": [device]}) == {("d", 0): (6 + 3) + (6 + 5 + 2)}


@pytest.mark.parametrize(
    "device",
    [
        7,
        {"name": "d", "instance_id": 0, "fields": 7},
        {"name": "d", "instance_id": 0, "fields": [7]},
        {"name": "d", "instance_id": 0, "fields": [{"size": -1}]},
        {"name": "d", "instance_id": 0, "fields": [{"size": 1.5}]},
        {"name": "d", "instance_id": 0, "fields": [{"size": True}]},
        {"name": "d", "instance_id": 0, "fields": [{"size": 1, "array_len": "3"}]},
        {"name": "d", "instance_id": 0, "fields": [{"size": 1 << 62, "array_len": 1 << 62}]},
        {"name": "d", "instance_id": 0, "fields": [], "subsections": [{}]},
        {"name": "d", "instance_id": 0, "fields": [], "subsections": [7]},
        {"name": 7, "instance_id": 0, "fields": []},
        {"name": "d", "instance_id": "0", "fields": []},
    ],
)
def test_device_that_makes_no_sense_has_no_length(device: object) -> None:
    good = {"name": "good", "instance_id": 0, "fields": [{"size": 5}]}
    assert body_lengths({"devices": [device, good]}) == {("good", 0): 5}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["devices", "fields", "subsections", "size", "name", "vmsd_name"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["devices", "page_size"]), json_values))
def test_any_description_gives_lengths_that_are_possible(value: dict[str, object]) -> None:
    assert all(0 <= length < 1 << 63 for length in body_lengths(value).values())


@given(st.binary(max_size=64))
def test_any_tail_is_searched_without_a_crash(noise: bytes) -> None:
    frame = b"\0" + struct.pack(">BI", 6, len(noise) + 2) + b"{" + noise + b"}"
    try:
        found = read_from_end(Sparse([(0, frame)]))
    except SnapshotError:
        return
    assert found is None or found.end == len(frame)
