"""The seek table of Zstandard's seekable form."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import NotSupported, SnapshotError
from pyqmigrate.format.seekable import (
    FOOTER_SIZE,
    FRAME_MAX,
    Footer,
    SeekTable,
    decode_skippable,
    encode_skippable,
    encode_table,
)
from tests.harness.examples import some

U32 = st.integers(0, (1 << 32) - 1)
FRAMES = st.lists(st.tuples(st.integers(0, 1 << 24), st.integers(0, FRAME_MAX), U32), max_size=30)


def decode(table: bytes, before: int) -> SeekTable:
    """Of a file with ``before`` bytes of frames."""
    footer = Footer.decode(table[-FOOTER_SIZE:], before + len(table))
    return SeekTable.decode(table[-footer.length :], footer)


@some
@given(FRAMES)
def test_a_table_is_decoded_as_it_was_encoded(frames: list[tuple[int, int, int]]) -> None:
    table = decode(encode_table(frames), sum(frame[0] for frame in frames))
    assert table.frames == len(frames)
    sizes = [(b - a) for a, b in zip(table.offsets, table.offsets[1:], strict=False)]
    lengths = [(b - a) for a, b in zip(table.positions, table.positions[1:], strict=False)]
    assert table.checksums is not None
    assert list(zip(sizes, lengths, table.checksums, strict=True)) == frames
    assert table.size == sum(frame[1] for frame in frames)


@some
@given(FRAMES.filter(lambda frames: any(frame[1] for frame in frames)), st.data())
def test_the_frame_with_a_byte_is_found(
    frames: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    table = decode(encode_table(frames), sum(frame[0] for frame in frames))
    position = data.draw(st.integers(0, table.size - 1))
    frame = table.frame_at(position)
    assert table.positions[frame] <= position < table.positions[frame + 1]


def test_a_table_without_checksums_is_read() -> None:
    content = struct.pack("<IIII", 5, 100, 7, 200) + struct.pack("<IBI", 2, 0, 0x8F92EAB1)
    table = decode(struct.pack("<II", 0x184D2A5E, len(content)) + content, 12)
    assert table.checksums is None
    assert list(table.positions) == [0, 100, 300]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1] + b"\0", "does not end with a seek table"),
        (lambda t: t[:-5] + b"\x84" + t[-4:], "descriptor"),
        (lambda t: t[:-9] + struct.pack("<I", 1 << 28) + t[-5:], "at most"),
        (lambda t: t[:-9] + struct.pack("<I", 1000) + t[-5:], "do not fit"),
        (lambda t: t[:-9] + struct.pack("<I", 1) + t[-5:], "start where it should"),
        (lambda t: b"\0" + t[1:], "start where it should"),
        (lambda t: t[:8] + struct.pack("<I", 6) + t[12:], "the frames have"),
    ],
)
def test_a_damaged_table_is_refused(change: object, message: str) -> None:
    table = encode_table([(5, 100, 1), (7, 200, 2)])
    with pytest.raises(SnapshotError, match=message) as raised:
        decode(change(table), 12)  # type: ignore[operator]
    assert raised.value.field == "seek table"


def test_frames_that_would_take_much_memory_are_refused() -> None:
    with pytest.raises(NotSupported, match="zstd -d"):
        decode(encode_table([(5, FRAME_MAX + 1, 1)]), 5)


@pytest.mark.parametrize("length", [0, 8])
def test_a_file_that_is_too_short_is_refused(length: int) -> None:
    with pytest.raises(SnapshotError, match="too short"):
        Footer.decode(b"\xb1" * length, length)


@some
@given(st.binary(max_size=80), st.integers(0, 1 << 20))
def test_any_end_of_a_file_is_decoded_or_refused(data: bytes, before: int) -> None:
    try:
        footer = Footer.decode(data, before + len(data))
        SeekTable.decode(data[-footer.length :], footer)
    except (SnapshotError, NotSupported):
        pass


@some
@given(st.integers(0, 15), st.binary(max_size=50))
def test_a_skippable_frame_is_decoded_as_it_was_encoded(number: int, content: bytes) -> None:
    frame = encode_skippable(number, content)
    assert decode_skippable(number, frame) == content
    assert decode_skippable((number + 1) % 16, frame) is None
    assert decode_skippable(number, frame[:-1]) is None
