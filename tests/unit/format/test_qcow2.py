"""qcow2: the header of any, and a new overlay. tests/qemu gives overlays to a real QEMU."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.format.qcow2 import (
    HEADER_SIZE,
    SIZE_MAX,
    backing_format,
    decode_header,
    encode_overlay,
)


def overlay(size: int = 1 << 30, name: bytes = b"/images/base", kind: str = "raw") -> bytes:
    image = bytearray()
    for offset, data in encode_overlay(size, name, kind):
        image += bytes(offset - len(image)) + data
    return bytes(image)


@given(
    st.integers(1, SIZE_MAX >> 5),
    st.binary(min_size=1, max_size=1023),
    st.sampled_from(["raw", "qcow2"]),
)
def test_overlay_says_what_it_is_over(size: int, name: bytes, kind: str) -> None:
    image = overlay(size, name, kind)
    header = decode_header(image[:HEADER_SIZE])
    assert header is not None
    assert header.size == size
    assert image[header.backing_offset :][: header.backing_size] == name
    assert backing_format(image[header.extensions_offset :]) == kind
    table = image[header.l1_offset :][: 8 * header.l1_entries]
    assert len(table) == 8 * header.l1_entries and not any(table)
    assert header.l1_entries << header.cluster_bits * 2 - 3 >= size


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_not(data: bytes) -> None:
    decode_header(data)
    decode_header(b"QFI\xfb\0\0\0\3" + data)
    backing_format(data)


def test_largest_overlay_has_the_largest_table() -> None:
    header = decode_header(overlay(SIZE_MAX)[:HEADER_SIZE])
    assert header is not None and header.l1_entries * 8 == 32 << 20


def test_what_is_not_a_qcow2_has_no_header() -> None:
    image = overlay()
    assert decode_header(b"QED\0" + image[4:]) is None
    assert decode_header(image[:7] + b"\x09" + image[8:]) is None
    assert decode_header(image[:50]) is None
