"""libvirt's header before a stream, read back and refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.libvirt import (
    ImageFormat,
    LibvirtHeader,
    encode_header,
    is_libvirt,
    read_header,
)
from tests.harness.stream_builders import Sparse

XML, COOKIE = "<domain type='qemu'/>\n", "<cookie/>\n"
HEADER = LibvirtHeader(
    complete=True,
    version=2,
    format=ImageFormat.SPARSE,
    was_running=True,
    xml=XML,
    cookie=COOKIE,
    stream_offset=92 + len(XML) + len(COOKIE) + 2 + 65536,
    byte_order="little",
)
# What libvirt 11.3 wrote for a running guest; two lengths of texts and 64 KiB are 67601.
WRITTEN = bytes.fromhex("02000000 11080100 01000000 06000000 25070000")


def source(data: bytes, size: int | None = None) -> Sparse:
    return Sparse([(0, data)], size)


def patched(offset: int, data: bytes) -> Sparse:
    return source(encode_header(HEADER)).patched(offset, data)


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=50)


@st.composite
def headers(draw: st.DrawFn) -> LibvirtHeader:
    xml, cookie = draw(texts), draw(texts)
    length = len(xml.encode()) + 1 + (len(cookie.encode()) + 1 if cookie else 0)
    return LibvirtHeader(
        complete=draw(st.booleans()),
        version=draw(st.sampled_from([1, 2])),
        format=draw(st.sampled_from(ImageFormat)),
        was_running=draw(st.booleans()),
        xml=xml,
        cookie=cookie,
        stream_offset=92 + max(2, length) + draw(st.integers(0, 70000)),
        byte_order=draw(st.sampled_from(["little", "big"])),
    )


@given(headers())
def test_header_survives_being_written_and_read(header: LibvirtHeader) -> None:
    data = encode_header(header)
    assert len(data) == header.stream_offset
    assert read_header(source(data)) == header


@given(st.integers(0, 200), st.binary(min_size=1, max_size=16))
def test_damaged_header_is_read_or_refused(offset: int, damage: bytes) -> None:
    file = patched(offset, damage)
    try:
        header = read_header(file)
    except SnapshotError:
        return
    assert 92 < header.stream_offset <= file.size


@given(st.integers(0, HEADER.stream_offset - 1))
def test_header_cut_anywhere_is_refused(size: int) -> None:
    with pytest.raises(SnapshotError):
        read_header(source(encode_header(HEADER)).cut(size))


def test_numbers_that_libvirt_wrote_are_understood() -> None:
    data = b"LibvirtQemudSave" + WRITTEN + bytes(56) + b"x" * 1828 + b"\0" + b"y" * 235
    header = read_header(source(data, 92 + 67601))
    assert header.stream_offset == 92 + 67601
    assert (header.version, header.format, header.was_running) == (2, ImageFormat.SPARSE, True)
    assert (len(header.xml), len(header.cookie)) == (1828, 235)


def test_numbers_are_written_as_libvirt_writes_them() -> None:
    header = HEADER._replace(xml="x" * 1828, cookie="y" * 235, stream_offset=92 + 67601)
    assert encode_header(header)[16:36] == WRITTEN


def test_image_that_libvirt_did_not_finish_is_known_as_such() -> None:
    assert not read_header(patched(12, b"Part")).complete


def test_image_is_known_by_its_first_bytes() -> None:
    assert is_libvirt(encode_header(HEADER)[:16])
    assert is_libvirt(encode_header(HEADER._replace(complete=False))[:16])
    assert not is_libvirt(b"QEVM\0\0\0\3" + bytes(8))


def test_bytes_that_are_not_utf8_are_kept() -> None:
    header = read_header(patched(93, b"\xff\xfe"))
    assert header.xml.encode("utf-8", "surrogateescape")[1:3] == b"\xff\xfe"
    assert encode_header(header) == patched(93, b"\xff\xfe").read_at(0, HEADER.stream_offset)


@pytest.mark.parametrize(
    ("offset", "value", "field"),
    [
        (16, 0, "version"),
        (16, 3, "version"),
        (20, 0, "data length"),
        (20, 0xFFFFFFFF, "data length"),
        (24, 2, "was_running"),
        (28, 7, "format"),
        (32, 1, "cookie offset"),
        (32, len(XML), "cookie offset"),
        (32, HEADER.stream_offset - 92, "cookie offset"),
    ],
)
def test_field_without_a_meaning_is_named(offset: int, value: int, field: str) -> None:
    with pytest.raises(SnapshotError) as caught:
        read_header(patched(offset, value.to_bytes(4, "little")))
    assert caught.value.field == field
    assert caught.value.offset == offset


def test_xml_without_an_end_is_refused() -> None:
    header = HEADER._replace(cookie="", stream_offset=92 + len(XML) + 1)
    data = encode_header(header)[:-1] + b"x"
    with pytest.raises(SnapshotError, match="no final NUL"):
        read_header(source(data))


def test_file_of_another_kind_is_refused() -> None:
    with pytest.raises(SnapshotError, match="magic"):
        read_header(source(b"QEVM\0\0\0\3" + bytes(200)))


@pytest.mark.parametrize(
    "header", [HEADER._replace(stream_offset=92 + len(XML)), HEADER._replace(xml="a\0b")]
)
def test_texts_that_cannot_be_written_are_refused(header: LibvirtHeader) -> None:
    with pytest.raises(ValueError, match=r"fit|NUL"):
        encode_header(header)
