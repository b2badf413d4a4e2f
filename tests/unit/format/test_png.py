"""PNG images, and the mark of those that this package writes."""

from __future__ import annotations

import io
import struct
import zlib

import pytest

from pyqmigrate.format.png import encode_png, is_marked, mark


def test_the_pixels_of_a_png_are_those_given() -> None:
    rows = [bytes((255, 0, 0, 0, 255, 0)), bytes((1, 2, 3, 4, 5, 6))]
    data = encode_png(rows, 2)
    assert struct.unpack(">II", data[16:24]) == (2, 2)
    length = struct.unpack(">I", data[33:37])[0]
    assert zlib.decompress(data[41 : 41 + length]) == b"".join(b"\0" + row for row in rows)


def test_image_is_recognized_by_its_first_bytes_only_with_the_mark() -> None:
    image = encode_png([bytes(9)], 3)
    assert is_marked(mark(image)[:64])
    assert not is_marked(image[:64])
    assert not is_marked(mark(image)[:63])


def test_mark_is_the_software_of_an_image_that_can_be_read() -> None:
    images = pytest.importorskip("PIL.Image")
    opened = images.open(io.BytesIO(mark(encode_png([b"\xff\0\0"], 1))))
    opened.load()
    assert opened.info["Software"] == "pyqmigrate"
    assert opened.getpixel((0, 0)) == (255, 0, 0)


def test_only_an_image_is_marked() -> None:
    with pytest.raises(ValueError, match="not a PNG"):
        mark(b"<svg>" + bytes(64))
