"""The index of a sequential stream against a twin in plain Python; and untrusted indexes."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from tests.harness import page_records as records
from tests.harness.examples import some
from tests.harness.kernel import Bytes, new_job
from tests.harness.page_records import NAMES, Name, Record
from tests.harness.strategies import record_lists

FILL, PLACED, CHANGED = 1, 2, 3
END = 1 << 62


def new_index(npages: int, page_size: int = 4096) -> Any:
    index = lib.qm_index_create(npages, page_size)
    assert index != ffi.NULL
    return ffi.gc(index, lib.qm_index_destroy)


def place(kind: int, value: int) -> int:
    return kind << 62 | value


def words(index: Any, first: int, npages: int) -> list[int]:
    out = ffi.new("uint64_t[]", npages)
    assert lib.qm_index_get(index, first, npages, out) == 0
    return list(out)


class Indexed:
    """A section of records in a file, and the indexes that a pass over it makes."""

    def __init__(
        self, section: bytes, lengths: Sequence[int], page_size: int, prefix: bytes = b"head"
    ) -> None:
        self.names = [Name(name) for name in NAMES]
        self.indexes = [new_index(n // page_size, page_size) for n in lengths]
        self.blocks = ffi.new("struct qm_record_block[]", len(lengths))
        for core, name, length, index in zip(
            self.blocks, self.names, lengths, self.indexes, strict=False
        ):
            core.name, core.len = name.core[0], length
            core.sink, core.index = lib.QM_SINK_INDEX, index
        self.decoder = ffi.gc(
            lib.qm_decoder_create(self.blocks, len(lengths), page_size, True),
            lib.qm_decoder_destroy,
        )
        self.fd = os.memfd_create("stream")
        os.pwrite(self.fd, prefix + section, 0)
        at, fault = ffi.new("int64_t *", len(prefix)), ffi.new("struct qm_fault *")
        self.job = new_job()
        self.rc = lib.qm_decode_file(
            self.job, self.decoder, self.fd, at, len(prefix) + len(section), fault
        )
        self.lengths = lengths

    def __enter__(self) -> Indexed:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def read(self, block: int, first: int = 0, length: int | None = None) -> Any:
        length = self.lengths[block] - first if length is None else length
        source = ffi.new("struct qm_indexed *")
        source.index, source.fd = self.indexes[block], self.fd
        out = ffi.new("unsigned char[]", max(length, 1))
        rc = lib.qm_indexed_fill(source, out, first, length)
        return rc if rc < 0 else bytes(ffi.buffer(out, length))

    def error(self) -> Any:
        error = ffi.new("struct qm_record_error *")
        lib.qm_decoder_error(self.decoder, error)
        return error


@some
@given(st.data(), st.sampled_from([1024, 4096, 65536]))
def test_pages_read_through_the_index_are_those_of_the_twin(
    data: st.DataObject, page_size: int
) -> None:
    npages = [data.draw(st.integers(1, 40)) for _ in NAMES]
    listed = data.draw(record_lists(npages, page_size))
    zeros: list[Bytes] = [np.zeros(n * page_size, dtype=np.uint8) for n in npages]
    expected, seen = records.apply(listed, zeros, page_size, fresh=True)
    section = records.stream_of(listed, NAMES, page_size)
    with Indexed(section, [n * page_size for n in npages], page_size) as made:
        assert made.rc == 1
        for n, memory in enumerate(expected):
            assert made.read(n) == memory.tobytes()
            mentioned = [word != 0 for word in words(made.indexes[n], 0, npages[n])]
            assert mentioned == seen[n].tolist()


def test_index_of_a_page_is_where_the_file_has_it() -> None:
    page = b"\x11" * 4096
    section = records.stream_of(
        [Record(0, 0, page=page), Record(0, 1, fill=7), Record(0, 2, page=page)], NAMES, 4096
    )
    with Indexed(section, [4 * 4096], 4096) as made:
        first = 4 + 8 + 1 + len(NAMES[0])
        assert words(made.indexes[0], 0, 4) == [
            place(PLACED, first),
            place(FILL, 7),
            place(PLACED, first + 4096 + 9 + 8),
            0,
        ]
        assert lib.qm_index_count(made.indexes[0]) == 3


@some
@given(st.sets(st.integers(0, 5000)), st.integers(0, 5100), st.integers(0, 5100))
def test_runs_are_those_of_a_list(data: set[int], first: int, end: int) -> None:
    npages = 5000
    data = {page for page in data if page < npages}
    index = new_index(npages)
    for page in data:
        assert lib.qm_index_page_at(index, page, page) == 1
    for page in range(0, npages, 3):
        if page not in data:
            lib.qm_index_fill_is(index, page, 0)
    end = min(end, npages)
    found = []
    at, kind = min(first, end), ffi.new("int *")
    while at < end:
        stop = lib.qm_index_run(index, at, end, kind)
        assert stop > at
        found += [bool(kind[0])] * (stop - at)
        at = stop
    assert found == [page in data for page in range(min(first, end), end)]


@some
@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(0, 300))
def test_run_of_bits_is_that_of_a_list(bits: list[bool], first: int) -> None:
    first = min(first, len(bits) - 1)
    array = ffi.new("uint64_t[]", -(-len(bits) // 64))
    for k, bit in enumerate(bits):
        array[k // 64] |= bit << k % 64
    stop = next((k for k in range(first, len(bits)) if bits[k] != bits[first]), len(bits))
    assert lib.qm_run(array, first, len(bits)) == stop


def test_far_pages_of_an_endless_block_cost_little() -> None:
    npages = 1 << 50
    index = new_index(npages)
    for page in (0, npages // 2, npages - 1):
        assert lib.qm_index_page_at(index, page, 99) == 1
        assert words(index, page, 1) == [place(PLACED, 99)]
    assert lib.qm_index_bytes(index) < 100_000
    assert lib.qm_index_next(index, 1) == npages // 2
    assert lib.qm_index_next(index, npages // 2 + 1) == npages - 1
    assert lib.qm_index_count(index) == 3


def test_page_outside_of_the_block_is_refused() -> None:
    index = new_index(10)
    assert lib.qm_index_fill_is(index, 10, 0) == -errno.EINVAL
    assert lib.qm_index_page_at(index, 10, 0) == -errno.EINVAL
    assert lib.qm_index_changed(index, 10, 0, 0) == -errno.EINVAL
    assert lib.qm_index_page_at(index, 0, 1 << 62) == -errno.EFBIG


def test_too_many_changes_to_a_page_are_refused() -> None:
    change = Record(0, 0, delta=((0, b"\1"),))
    limit = [Record(0, 0, fill=0), *[change] * lib.QM_CHANGES_MAX]
    with Indexed(records.stream_of(limit, NAMES, 4096), [4096], 4096) as made:
        assert made.rc == 1
        assert made.read(0)[:2] == b"\1\0"
    with Indexed(records.stream_of([*limit, change], NAMES, 4096), [4096], 4096) as made:
        assert made.rc == -errno.EBADMSG
        assert made.error().what == lib.QM_RECORD_CHANGES


def test_whole_page_ends_the_count_of_its_changes() -> None:
    changes = [Record(0, 0, delta=((0, b"\1"),))] * lib.QM_CHANGES_MAX
    listed = [*changes, Record(0, 0, fill=9), *changes]
    with Indexed(records.stream_of(listed, NAMES, 4096), [4096], 4096) as made:
        assert made.rc == 1
        assert made.read(0) == b"\1" + b"\x09" * 4095


def test_few_pages_at_far_places_are_refused_before_they_cost_memory() -> None:
    far = [Record(0, k * 512, fill=1) for k in range(40000)]
    section = records.stream_of(far, NAMES, 1024)
    with Indexed(section, [1 << 60], 1024) as made:
        assert made.rc == -errno.EBADMSG
        assert made.error().what == lib.QM_RECORD_SCATTERED
        assert lib.qm_index_bytes(made.indexes[0]) < 80 << 20


def test_file_that_became_shorter_has_no_data() -> None:
    section = records.stream_of([Record(0, k, page=b"\2" * 4096) for k in range(4)], NAMES, 4096)
    with Indexed(section, [4 * 4096], 4096) as made:
        os.ftruncate(made.fd, 3 * 4096)
        assert made.read(0, 0, 4096) == b"\2" * 4096
        assert made.read(0) == -errno.ENODATA


@pytest.mark.parametrize("off", [1, 4095])
def test_part_of_a_page_is_not_read(off: int) -> None:
    with Indexed(records.END_MARK, [4 * 4096], 4096) as made:
        assert made.read(0, off, 4096) == -errno.EINVAL
        assert made.read(0, 0, off) == -errno.EINVAL
        assert made.read(0, 4096, 4 * 4096) == -errno.EINVAL


HOSTILE = {
    "page past the end": place(PLACED, 4097),
    "page far away": place(PLACED, (1 << 62) - 1),
    "fill that is no byte": place(FILL, 256),
    "change that is not there": place(CHANGED, 1),
    "no kind": 5,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_impossible_word_is_not_taken(what: str) -> None:
    index = new_index(4)
    change = ffi.new("struct qm_change *", {"before": place(FILL, 0), "at": 0, "len": 9})
    assert lib.qm_index_put_changes(index, change, 1, 8192) == 0
    good = ffi.new("uint64_t[]", [place(PLACED, 4096), place(FILL, 255), place(CHANGED, 0)])
    assert lib.qm_index_put(index, 0, 3, good, 8192) == 0
    bad = ffi.new("uint64_t[]", [HOSTILE[what]])
    assert lib.qm_index_put(index, 3, 1, bad, 8192) == -errno.EBADMSG
    assert lib.qm_index_put(index, 4, 1, good, 8192) == -errno.EINVAL


@pytest.mark.parametrize("before", [place(CHANGED, 0), place(CHANGED, 7), place(PLACED, 8192)])
def test_change_of_what_is_not_before_it_is_not_taken(before: int) -> None:
    change = ffi.new("struct qm_change *", {"before": before, "at": 0, "len": 9})
    assert lib.qm_index_put_changes(new_index(4), change, 1, 8192) == -errno.EBADMSG


def test_change_outside_of_the_file_is_not_taken() -> None:
    change = ffi.new("struct qm_change *", {"before": 0, "at": 8190, "len": 9})
    assert lib.qm_index_put_changes(new_index(4), change, 1, 8192) == -errno.EBADMSG


def test_page_size_that_is_none_makes_no_index() -> None:
    for size in (0, 512, 4095, 1 << 17):
        assert lib.qm_index_create(10, size) == ffi.NULL


@some
@given(st.lists(st.integers(0, 2), min_size=1, max_size=200), st.integers(0, 400))
def test_mapped_pages_are_zero_where_their_bit_is_clear(kinds: list[int], skip: int) -> None:
    """0: clear over a hole, 1: clear over stale bytes, 2: set."""
    page, offset = 1024, 1536
    fd = os.memfd_create("mapped")
    os.ftruncate(fd, offset + page * len(kinds))
    bits = ffi.new("uint64_t[]", -(-len(kinds) // 64))
    expected = b""
    for k, kind in enumerate(kinds):
        bits[k // 64] |= (kind == 2) << k % 64
        if kind:
            os.pwrite(fd, bytes([k % 255 + 1]) * page, offset + k * page)
        expected += bytes([k % 255 + 1 if kind == 2 else 0]) * page
    source = ffi.new("struct qm_mapped *")
    source.data, source.npages, source.fd = bits, len(kinds), fd
    source.pages_offset, source.page_size = offset, page
    first = min(skip, len(kinds))
    out = ffi.new("unsigned char[]", len(expected) + 1)
    length = (len(kinds) - first) * page
    assert lib.qm_mapped_fill(source, out, first * page, length) == length
    assert bytes(ffi.buffer(out, length)) == expected[first * page :]
    nxt = next((k for k in range(first, len(kinds)) if kinds[k] == 2), len(kinds))
    assert lib.qm_mapped_next(source, first * page, len(expected)) == nxt * page
    part = ffi.new("struct qm_slice *")
    part.fill, part.next = lib.qm_mapped_fill, lib.qm_mapped_next
    part.arg, part.offset = source, first * page
    assert lib.qm_slice_fill(part, out, 0, length) == length
    assert bytes(ffi.buffer(out, length)) == expected[first * page :]
    assert lib.qm_slice_next(part, 0, length) == (nxt - first) * page
    assert lib.qm_slice_fill(part, out, 0, length + page) == -errno.EINVAL
    os.close(fd)


@some
@given(st.sets(st.integers(0, 2000)), st.integers(0, 1 << 23), st.integers(1, 1 << 16))
def test_pages_that_are_made_of_some_bytes_are_those_of_a_list(
    pages: set[int], start: int, length: int
) -> None:
    index, end = new_index(2001), start + length
    expected = []
    for page in sorted(pages):
        lib.qm_index_page_at(index, page, page * 4104)
        changed = page % 3 == 0
        if changed:  # twice: the first change counts too
            lib.qm_index_changed(index, page, (1 << 22) + page * 10, 5)
            lib.qm_index_changed(index, page, 0, 0)
        if (page * 4104 < end and start < page * 4104 + 4096) or (
            changed and (1 << 22) + page * 10 < end and start < (1 << 22) + page * 10 + 5
        ):
            expected.append(page)
    found, page = [], 0
    while (page := lib.qm_index_from(index, page, start, end)) < 2001:
        found.append(page)
        page += 1
    assert found == expected
