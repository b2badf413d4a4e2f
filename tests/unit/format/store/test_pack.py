"""Footers of packs round-trip; every wrong number in one is refused."""

from __future__ import annotations

import struct
from array import array
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.store.pack import (
    MAGIC,
    NO_BASE,
    PACK_MAX,
    TRAILER_SIZE,
    BasePage,
    PackFooter,
    footer_size,
)
from tests.harness.examples import some
from tests.harness.store_documents import KEY, example_footer, footers


def whole(footer: PackFooter, key: bytes = KEY) -> bytes:
    """A pack with that footer; its frames are not zstd."""
    return MAGIC + bytes(sum(footer.lengths)) + footer.encode(key)


def decode(pack: bytes, *, key: bytes = KEY, size: int | None = None) -> PackFooter:
    return PackFooter.decode(key, pack, len(pack) if size is None else size, "p1")


@some
@given(footers())
def test_a_footer_that_is_written_is_read_from_the_end_of_the_pack(footer: PackFooter) -> None:
    pack = whole(footer)
    needed = PackFooter.end_size(pack[-TRAILER_SIZE:], len(pack), "p1")
    assert pack[-needed:] == footer.encode(KEY)
    read = decode(pack[-needed:], size=len(pack))
    assert read == footer == decode(pack)
    assert len(read) == sum(footer.npages)
    assert needed == TRAILER_SIZE + footer_size(
        len(footer.lengths), len(footer), len(footer.base_pages), len(footer.base_packs)
    )


@some
@given(footers())
def test_each_page_is_in_the_frame_that_says_so(footer: PackFooter) -> None:
    pages = 0
    for number in range(len(footer.lengths)):
        frame = footer.frame(number)
        assert frame.first == pages
        for page in range(pages, pages + frame.npages):
            assert footer.frame_of(page) == frame
            assert footer.digest(page) == footer.digests[16 * page : 16 * page + 16]
        pages += frame.npages
    for page in (-1, pages):
        with pytest.raises(IndexError):
            footer.frame_of(page)


def test_frames_and_bases_are_where_they_were_put() -> None:
    footer = example_footer()
    frame = footer.frame_of(3)
    assert (frame.number, frame.offset, frame.length, frame.xor) == (1, 108, 40, True)
    assert footer.base(frame, 3) == BasePage(b"q" * 16, 70)
    assert footer.base(frame, 4) is None
    assert footer.frames_end == 157


@some
@given(footers(), st.data())
def test_a_flipped_bit_of_the_end_is_found(footer: PackFooter, data: st.DataObject) -> None:
    pack = bytearray(whole(footer))
    place = data.draw(st.integers(len(pack) - len(footer.encode(KEY)), len(pack) - 1))
    pack[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SnapshotError, match="pack p1"):
        decode(bytes(pack))


def test_a_footer_of_another_store_is_refused() -> None:
    with pytest.raises(SnapshotError, match="another store"):
        decode(whole(example_footer(), b"k" * 32))


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": array("I", [100, 40, 8])},  # the frames end before the footer
        {"lengths": array("I", [0, 140, 9])},
        {"lengths": array("I", [1 << 31, 40, 9])},
        {"npages": array("H", [3, 2, 0])},
        {"npages": array("H", [3, 2, 2])},
        {"npages": array("H", [65, 2, 1])},
        {"kinds": array("H", [0, 2, 0])},
        {"kinds": array("H", [0, 0, 0])},  # bases without an XOR frame
        {"base_numbers": array("I", [2, NO_BASE])},
        {"base_numbers": array("I", [NO_BASE, NO_BASE])},  # a page without a pack
        {"base_pages": array("I", [65536, NO_BASE])},
        {"base_pages": array("I", [NO_BASE, NO_BASE])},
        {"base_packs": (b"p" * 16, b"p" * 16)},
        {"digests": bytes(5 * 16)},
    ],
)
def test_a_wrong_number_under_a_right_digest_is_refused(changes: dict[str, Any]) -> None:
    end = replace(example_footer(), **changes).encode(KEY)
    pack = MAGIC + bytes(149) + end
    with pytest.raises(SnapshotError, match="pack p1"):
        decode(pack)


def test_counts_that_do_not_fit_are_refused_before_anything_is_made_of_them() -> None:
    from pyqmigrate.format.store.keyed import keyed_digest

    for counts in ((1 << 31, 1, 0, 0), (1, 1 << 31, 0, 0), (0, 0, 1 << 31, 0), (0, 0, 0, 1 << 31)):
        footer = struct.pack("<4I", *counts)
        trailer = struct.pack("<II", len(footer), 0) + keyed_digest(KEY, [footer]) + MAGIC
        with pytest.raises(SnapshotError, match="do not fit"):
            decode(MAGIC + footer + trailer)


@some
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    trailer = struct.pack("<II", 50, 0) + bytes(16) + MAGIC
    for pack in (data, MAGIC + data, MAGIC + data + trailer):
        with pytest.raises(SnapshotError):
            decode(pack)


def test_a_size_that_no_pack_has_is_refused() -> None:
    end = example_footer().encode(KEY)
    for size in (0, TRAILER_SIZE, PACK_MAX + 1, 1 << 62):
        with pytest.raises(SnapshotError, match="cannot be a pack"):
            PackFooter.end_size(end, size, "p1")
    with pytest.raises(SnapshotError, match="cut off"):
        decode(end[8:], size=len(end) + 157)
