"""The index of one block: where its pages are in the stream."""

from __future__ import annotations

import struct

import pytest

from pyqmigrate.core import JobState
from pyqmigrate.io.block_index import BlockIndex
from pyqmigrate.io.records import Decoded, Decoder
from tests.harness.page_records import END_MARK, Record, stream_of

PAGE = 4096
CONTENT = bytes([5]) * PAGE


def indexed(records: list[Record], npages: int = 8) -> BlockIndex:
    index = BlockIndex(npages, PAGE)
    decoder = Decoder([("ram", npages * PAGE)], PAGE)
    decoder.write_to_index(0, index)
    decoder.start()
    data = stream_of(records, [b"ram"], PAGE)
    assert data.endswith(END_MARK)
    assert decoder.decode(JobState(), data) == Decoded.END
    return index


def test_new_index_mentions_no_page() -> None:
    index = BlockIndex(8, PAGE)
    assert (index.next(0), index.data_pages(), index.count_changes()) == (8, 0, 0)
    assert index.run(0, 8) == (8, False)


def test_pages_are_found_with_their_kind() -> None:
    index = indexed([Record(0, 2, page=CONTENT), Record(0, 3, page=CONTENT), Record(0, 5, fill=0)])
    assert [index.next(page) for page in (0, 3, 4, 6)] == [2, 3, 5, 8]
    assert index.data_pages() == 2
    assert [index.run(page, 8) for page in (0, 2, 4)] == [(2, False), (4, True), (8, False)]


def test_changes_are_listed_with_their_length() -> None:
    index = indexed([Record(0, 1, page=CONTENT), Record(0, 1, delta=((0, b"ab"),))])
    assert index.count_changes() == 1
    [(_before, position, length)] = index.changes()
    assert position > 0
    assert length == 4  # two lengths and two bytes
    assert index.data_pages() == 1


def test_words_of_one_index_make_another() -> None:
    index = indexed([Record(0, 2, page=CONTENT), Record(0, 5, fill=0)])
    other = BlockIndex(8, PAGE)
    other.put_words(2, index.words(2, 4), 1 << 20)
    assert other.words(0, 8) == index.words(0, 8)
    assert other.data_pages() == 1


def test_page_depends_on_the_bytes_of_its_record() -> None:
    index = indexed([Record(0, 2, page=CONTENT)])
    assert index.next_from(0, 0, 1 << 20) == 2
    assert index.next_from(3, 0, 1 << 20) == 8
    assert index.next_from(0, 1 << 20, 2 << 20) == 8


def test_places_outside_of_the_file_are_refused() -> None:
    index = indexed([Record(0, 2, page=CONTENT)])
    with pytest.raises(ValueError):
        BlockIndex(8, PAGE).put_words(2, index.words(2, 1), 100)
    with pytest.raises(ValueError):
        BlockIndex(8, PAGE).put_words(0, struct.pack("=Q", 0xFFFFFFFFFFFFFFFF), 1 << 20)
    with pytest.raises(ValueError):
        BlockIndex(8, PAGE).put_change(0, 1 << 20, 10, 1 << 20)
