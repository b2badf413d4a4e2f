"""Comparing two memories is what comparing their pages in plain Python gives."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from tests.harness.examples import few, some
from tests.harness.kernel import (
    PAGE_SIZES,
    Bits,
    Bytes,
    new_channel,
    new_job,
    to_bits,
    to_words,
    totals,
)
from tests.harness.strategies import page_bits


class Source:
    """Memory without an address; what is zero is skipped if ``skips``."""

    def __init__(self, content: Bytes, page_size: int, *, skips: bool = True) -> None:
        self.content, self.page_size = content, page_size
        self.reads: list[tuple[int, int]] = []
        self.core = ffi.new("struct qm_memory *")
        self.core.fd = -1
        self._fill = ffi.callback("qm_fill_fn", self.fill)
        self._next = ffi.callback("qm_next_fn", self.next)
        self.core.fill = self._fill
        if skips:
            self.core.next = self._next

    def fill(self, _: Any, buffer: Any, offset: int, length: int) -> int:
        self.reads.append((offset, length))
        data = self.content[offset : offset + length].tobytes()
        ffi.memmove(buffer, data, len(data))
        return len(data)

    def next(self, _: Any, offset: int, end: int) -> int:
        found = np.flatnonzero(self.content[offset:end])
        return int(offset + found[0]) if len(found) else int(end)


@dataclass
class Result:
    rc: int
    differing: Bits
    zero: tuple[int, int]
    fault: Any
    totals: Any = field(repr=False)


def compare(
    a: Source,
    b: Source,
    npages: int,
    page_size: int,
    selection: Bits | None = None,
    job: Any = None,
) -> Result:
    job, channel = job or new_job(), new_channel()
    words = ffi.new("uint64_t[]", max(1, -(-npages // 64)))
    chosen = ffi.NULL if selection is None else to_words(selection)
    comparison, fault = ffi.new("struct qm_comparison *"), ffi.new("struct qm_fault *")
    comparison.job, comparison.memory = job, [a.core, b.core]
    comparison.npages, comparison.page_size = npages, page_size
    comparison.selection, comparison.differing = chosen, words
    rc = lib.qm_compare_memories(comparison, channel, 0, npages, fault)
    zero = int(comparison.zero[0]), int(comparison.zero[1])
    return Result(rc, to_bits(words, npages), zero, fault, totals(job))


def pages_of(content: Bytes, page_size: int) -> list[bytes]:
    return [content[at : at + page_size].tobytes() for at in range(0, len(content), page_size)]


@some
@given(st.data())
def test_the_pages_found_are_those_of_the_twin(data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from(PAGE_SIZES))
    npages = data.draw(st.integers(1, 200))
    zero_in_a, zero_in_b, same = (data.draw(page_bits(npages)) for _ in range(3))
    selection = data.draw(st.one_of(st.none(), page_bits(npages)))
    skips = data.draw(st.booleans())
    a = np.zeros((npages, page_size), dtype=np.uint8)
    # The last byte only: a comparison that ends early misses it.
    a[:, -1] = 1 + np.arange(npages) % 200
    b = a.copy()
    b[~same, data.draw(st.integers(0, page_size - 1))] ^= 0x80
    a[zero_in_a], b[zero_in_b] = 0, 0
    a, b = a.reshape(-1), b.reshape(-1)
    sources = Source(a, page_size, skips=skips), Source(b, page_size, skips=skips)
    found = compare(*sources, npages, page_size, selection)
    twin = np.array(
        [x != y for x, y in zip(pages_of(a, page_size), pages_of(b, page_size), strict=True)]
    )
    if selection is not None:
        twin &= selection
    assert found.rc == 0
    assert (found.differing == twin).all()
    assert found.zero == ((twin & zero_in_a).sum(), (twin & zero_in_b).sum())
    chosen = npages if selection is None else selection.sum()
    assert found.totals.bytes_done == chosen * page_size


@few
@given(st.data())
def test_pages_that_are_not_selected_are_not_read(data: st.DataObject) -> None:
    selection = data.draw(page_bits(128))
    content = np.full(128 * 1024, 1, dtype=np.uint8)
    a, b = Source(content, 1024), Source(content, 1024)
    assert compare(a, b, 128, 1024, selection).rc == 0
    read = np.zeros(128, dtype=bool)
    for offset, length in a.reads:
        read[offset // 1024 : (offset + length) // 1024] = True
    assert (read == selection).all()


def test_what_is_a_hole_in_both_is_not_read() -> None:
    content = np.zeros(64 * 4096, dtype=np.uint8)
    a, b = Source(content, 4096), Source(content, 4096)
    assert compare(a, b, 64, 4096).rc == 0
    assert a.reads == b.reads == []


def test_data_of_one_is_compared_with_the_hole_of_the_other() -> None:
    empty = np.zeros(8 * 4096, dtype=np.uint8)
    content = empty.copy()
    content[5 * 4096 + 17] = 1
    for a, b, zero in ((empty, content, (1, 0)), (content, empty, (0, 1))):
        found = compare(Source(a, 4096), Source(b, 4096), 8, 4096)
        assert found.differing.nonzero()[0].tolist() == [5]
        assert found.zero == zero


@pytest.mark.parametrize("side", [0, 1])
def test_an_error_names_the_memory_and_the_place(side: int) -> None:
    content = np.full(256 * 4096, 1, dtype=np.uint8)
    sources = [Source(content, 4096), Source(content, 4096)]
    sources[side].content = content[: 200 * 4096 + 5]
    found = compare(*sources, 256, 4096)
    assert found.rc == -errno.ENODATA
    assert (found.fault.in_memory, found.fault.block) == (1, side)
    assert found.fault.at == 200 * 4096 + 5


def test_a_cancelled_job_reads_nothing() -> None:
    content, job = np.full(4096, 1, dtype=np.uint8), new_job()
    lib.qm_job_cancel(job)
    a, b = Source(content, 4096), Source(content, 4096)
    assert compare(a, b, 1, 4096, job=job).rc == -errno.ECANCELED
    assert a.reads == []


@pytest.mark.parametrize(
    ("first", "npages", "page_size"), [(0, 65, 4096), (1, 3, 4096), (0, 4, 999)]
)
def test_bad_ranges_and_sizes_are_refused(first: int, npages: int, page_size: int) -> None:
    content = np.zeros(64 * 4096, dtype=np.uint8)
    a, b = Source(content, 4096), Source(content, 4096)
    words, fault = ffi.new("uint64_t[2]"), ffi.new("struct qm_fault *")
    comparison, job = ffi.new("struct qm_comparison *"), new_job()
    comparison.job, comparison.memory = job, [a.core, b.core]
    comparison.npages, comparison.page_size, comparison.differing = 64, page_size, words
    rc = lib.qm_compare_memories(comparison, new_channel(), first, npages, fault)
    assert rc == -errno.EINVAL
