"""The classes of pages, and their numbers in the cells of a map, are those of plain Python."""

from __future__ import annotations

import errno
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from tests.harness.core_twin import entropy, estimated_entropy, page_class, sampled
from tests.harness.examples import few, some
from tests.harness.kernel import PAGE_SIZES, Bits, Bytes, new_channel, new_job, to_words, totals
from tests.harness.strategies import page_bits

STEP = 1 / 256  # of an entropy


def classify(memory: Bytes, page_size: int) -> list[str | float]:
    found = ffi.new("uint16_t[]", len(memory) // page_size)
    with ffi.from_buffer(memory) as data:
        assert lib.qm_classify(data, len(found), page_size, found) == 0
    names = {lib.QM_CLASS_ZERO: "zero", lib.QM_CLASS_FILLED: "filled"}
    return [names.get(value, value * STEP) for value in found]


def same(found: str | float, twin: str | float) -> bool:
    if isinstance(found, str) or isinstance(twin, str):
        return found == twin
    return abs(found - twin) <= 2 * STEP


@st.composite
def pages(draw: st.DrawFn, page_size: int) -> Bytes:
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    kind = draw(st.sampled_from(["zero", "filled", "few", "skewed", "random", "nearly", "mixed"]))
    page = np.zeros(page_size, dtype=np.uint8)
    if kind == "filled":
        page.view(np.uint64)[:] = draw(st.integers(1, (1 << 64) - 1))
    elif kind == "few":
        page[:] = rng.integers(0, draw(st.integers(2, 8)), page_size)
    elif kind == "skewed":
        page[:] = rng.zipf(draw(st.floats(1.2, 4)), page_size) % 256
    elif kind == "random":
        page[:] = rng.integers(0, 256, page_size)
    elif kind == "nearly":  # one byte is not as the others
        page[draw(st.integers(0, page_size - 1))] = draw(st.integers(1, 255))
    elif kind == "mixed":
        page[draw(st.integers(0, page_size - 1)) :] = rng.integers(0, 256, 1)
        page[: page_size // 2] += rng.integers(0, 3, page_size // 2).astype(np.uint8)
    return page


@some
@given(st.data())
def test_the_class_of_a_page_is_that_of_the_twin(data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from(PAGE_SIZES))
    drawn = [data.draw(pages(page_size)) for _ in range(data.draw(st.integers(1, 6)))]
    found = classify(np.concatenate(drawn), page_size)
    for value, page in zip(found, drawn, strict=True):
        assert same(value, page_class(page)), (value, page_class(page))


@pytest.mark.parametrize("value", [0, 1, 200])
def test_a_page_with_one_byte_most_often_is_counted_right(value: int) -> None:
    """Its number does not fit into eight bits."""
    page = np.full(4096, value, dtype=np.uint8)
    page[::64] = np.arange(64) + 100
    assert same(classify(page, 4096)[0], estimated_entropy(page))


@some
@given(st.data())
def test_the_error_of_the_sample_has_a_bound(data: st.DataObject) -> None:
    """Entropies differ by at most d log2(255) + h(d), where d is the distance of the frequencies in the
    sample from those in the page (Fannes and Audenaert), and the correction by what it is."""
    page = data.draw(pages(4096))
    found = classify(page, 4096)[0]
    if isinstance(found, str):
        return
    part, whole = (np.bincount(x, minlength=256) / len(x) for x in (sampled(page), page))
    distance = float(abs(part - whole).sum() / 2)
    mixing = sum(-p * math.log2(p) for p in (distance, 1 - distance) if p > 0)
    correction = (len(np.unique(sampled(page))) - 1) / (2 * math.log(2)) * 7 / 8 / 512
    bound = distance * math.log2(255) + mixing + correction + 2 * STEP
    assert abs(found - entropy(page)) <= bound


@few
@given(st.integers(0, 9), st.integers(0, 9999), st.integers(2, 256))
def test_a_structure_that_repeats_hides_nothing_from_the_sample(
    doublings: int, seed: int, values: int
) -> None:
    """Only the correction is wrong then: 0.32 bit at most."""
    period = np.random.default_rng(seed).integers(0, values, 1 << doublings).astype(np.uint8)
    page = np.tile(period, 4096 >> doublings)
    found = classify(page, 4096)[0]
    if not isinstance(found, str):
        assert -2 * STEP <= found - entropy(page) <= 255 / (2 * math.log(2)) * 7 / 8 / 512 + STEP


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.5, 3.0, 100.0])
def test_the_entropy_of_bytes_of_one_distribution_is_right_within_half_a_bit(alpha: float) -> None:
    rng = np.random.default_rng(7)
    drawn = []
    for _ in range(100):
        shares = rng.dirichlet(np.full(256, alpha))
        drawn.append(rng.choice(256, 4096, p=shares).astype(np.uint8))
    found = classify(np.concatenate(drawn), 4096)
    errors = [
        value - entropy(page)
        for value, page in zip(found, drawn, strict=True)
        if not isinstance(value, str)
    ]
    assert max(map(abs, errors)) < 0.5
    assert abs(np.mean(errors)) < 0.15


def test_a_bad_page_size_is_refused() -> None:
    found = ffi.new("uint16_t[1]")
    for size in (0, 512, 4097, 1 << 17):
        assert lib.qm_classify(ffi.new("char[]", 8192), 1, size, found) == -errno.EINVAL


# ---- cells ----


class Source:
    """Memory without an address, of which the pages of ``stored`` are in a file."""

    def __init__(self, content: Bytes, page_size: int, stored: Bits) -> None:
        self.content, self.page_size, self.stored = content, page_size, stored
        self.reads: list[tuple[int, int]] = []
        self.job: Any = None
        self.core = ffi.new("struct qm_memory *")
        self.core.fd = -1
        self._fill = ffi.callback("qm_fill_fn", self.fill)
        self._next = ffi.callback("qm_next_fn", self.next)
        self.core.fill, self.core.next = self._fill, self._next

    def fill(self, _: Any, buffer: Any, offset: int, length: int) -> int:
        self.reads.append((offset, length))
        data = self.content[offset : offset + length].tobytes()
        ffi.memmove(buffer, data, len(data))
        return len(data)

    def next(self, _: Any, offset: int, end: int) -> int:
        first = offset // self.page_size
        if self.stored[first]:
            return int(offset)
        found = np.flatnonzero(self.stored[first : -(-end // self.page_size)])
        return min(int(end), int((first + found[0]) * self.page_size)) if len(found) else int(end)


def new_map(source: Source, npages: int, lead: int, cell_pages: int, job: Any = None) -> Any:
    ncells = -(-(lead + npages) // cell_pages)
    cells, page_map = ffi.new("struct qm_cell[]", ncells), ffi.new("struct qm_page_map *")
    source.job = job or new_job()  # kept as long as the source
    page_map.job, page_map.memory = source.job, source.core
    page_map.npages, page_map.page_size = npages, source.page_size
    page_map.lead, page_map.cell_pages = lead, cell_pages
    page_map.cells, page_map.ncells = cells, ncells
    return page_map, cells


def test_nothing_of_a_hole_is_read_and_every_page_is_counted_once() -> None:
    check_cells(np.arange(300) % 7 == 3, 3, 10, np.random.default_rng(1), 1024)


@some
@given(st.data())
def test_the_cells_are_those_of_the_twin(data: st.DataObject) -> None:
    npages, cell_pages = data.draw(st.integers(1, 700)), data.draw(st.integers(1, 90))
    lead = data.draw(st.integers(0, cell_pages - 1))
    stored = data.draw(page_bits(npages))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    check_cells(stored, lead, cell_pages, rng, data.draw(st.sampled_from([1024, 4096])))


def check_cells(
    stored: Bits, lead: int, cell_pages: int, rng: np.random.Generator, page_size: int
) -> None:
    npages = len(stored)
    content = rng.integers(0, 256, (npages, page_size)).astype(np.uint8)
    kinds = rng.integers(0, 3, npages)
    content[kinds == 1] = 7
    content[(kinds == 2) | ~stored] = 0
    source = Source(content.reshape(-1), page_size, stored)
    job = new_job()
    page_map, cells = new_map(source, npages, lead, cell_pages, job)
    fault, channel = ffi.new("struct qm_fault *"), new_channel()
    first = 0
    while first < npages:  # in parts, as channels do
        part = min(int(rng.integers(1, 300)), npages - first)
        assert lib.qm_map_pages(page_map, channel, first, part, fault) == 0
        first += part
    twin: dict[int, Counter[str]] = {}
    entropies = Counter[int]()
    levels = Counter[int]()
    for page in range(npages):
        cell = (lead + page) // cell_pages
        kind = "hole" if not stored[page] else ("data", "filled", "zero")[kinds[page]]
        twin.setdefault(cell, Counter())[kind] += 1
        if kind == "data":
            value = round(float(classify(content[page], page_size)[0]) / STEP)
            entropies[cell] += value
            levels[min(value // lib.QM_LEVEL, lib.QM_LEVELS - 1)] += 1
    for number in range(page_map.ncells):
        counts = {k: getattr(cells[number], k) for k in ("data", "filled", "zero", "hole")}
        assert counts == {key: twin.get(number, Counter())[key] for key in counts}
        assert cells[number].entropy == entropies[number]
    assert [*page_map.levels] == [levels[k] for k in range(lib.QM_LEVELS)]
    assert totals(job).bytes_done == npages * page_size
    read = np.zeros(npages, dtype=bool)
    for offset, length in source.reads:
        assert stored[offset // page_size], "a read begins with a hole"
        read[offset // page_size : (offset + length) // page_size] = True
    assert (read | ~stored).all()


@some
@given(st.data())
def test_bits_are_counted_in_the_cells_of_their_pages(data: st.DataObject) -> None:
    bits = data.draw(page_bits(data.draw(st.integers(1, 500))))
    first = data.draw(st.integers(0, len(bits) - 1))
    npages, cell_pages = data.draw(st.integers(1, len(bits) - first)), data.draw(st.integers(1, 99))
    lead = data.draw(st.integers(0, cell_pages - 1))
    source = Source(np.zeros(0, dtype=np.uint8), 4096, bits)
    page_map, cells = new_map(source, npages, lead, cell_pages)
    assert lib.qm_map_bits(page_map, to_words(bits), first, lib.QM_CHANGED) == 0
    twin = np.zeros(page_map.ncells, dtype=int)
    for page in np.flatnonzero(bits[first : first + npages]):
        twin[(lead + page) // cell_pages] += 1
    assert [cell.changed for cell in cells] == twin.tolist()
    assert all(cell.touched == 0 for cell in cells)


@few
@given(st.lists(st.integers(0, 5000), min_size=6, max_size=6), st.integers(0, 2048))
def test_a_share_is_none_or_all_only_if_it_is(numbers: list[int], each: int) -> None:
    data, filled, zero, hole, changed, touched = numbers
    cell = ffi.new("struct qm_cell *")
    cell.data, cell.filled, cell.zero, cell.hole = data, filled, zero, hole
    total = data + filled + zero + hole
    cell.changed, cell.touched = min(changed, total), min(touched, total)
    cell.entropy = data * each
    summary = ffi.new("unsigned char[]", lib.QM_SUMMARY)
    lib.qm_summarize_cells(cell, 1, summary)
    assert summary[0] == (total > 0)
    places = {1: data, 2: filled, 3: zero, 5: cell.changed, 6: cell.touched}
    for place, number in places.items():
        assert (summary[place] == 0) == (number == 0)
        assert (summary[place] == 255) == (number == total > 0)
        assert abs(summary[place] - 255 * number / max(total, 1)) <= 1
    assert abs(summary[4] * 8 - (each if data else 0)) <= 8


def test_an_error_names_the_place() -> None:
    stored = np.ones(256, dtype=bool)
    source = Source(np.ones(200 * 4096 + 5, dtype=np.uint8), 4096, stored)
    page_map, _ = new_map(source, 256, 0, 16)
    fault = ffi.new("struct qm_fault *")
    assert lib.qm_map_pages(page_map, new_channel(), 0, 256, fault) == -errno.ENODATA
    assert (fault.in_memory, fault.at) == (1, 200 * 4096 + 5)


def test_a_cancelled_job_reads_nothing() -> None:
    source, job = Source(np.ones(4096, dtype=np.uint8), 4096, np.ones(1, dtype=bool)), new_job()
    lib.qm_job_cancel(job)
    page_map, _ = new_map(source, 1, 0, 1, job)
    fault = ffi.new("struct qm_fault *")
    assert lib.qm_map_pages(page_map, new_channel(), 0, 1, fault) == -errno.ECANCELED
    assert source.reads == []


@pytest.mark.parametrize(
    ("changes", "first", "npages"),
    [
        ({}, 0, 65),
        ({}, 65, 0),
        ({"page_size": 999}, 0, 4),
        ({"ncells": 3}, 0, 4),
        ({"cell_pages": 0}, 0, 4),
        ({"cell_pages": 1 << 32}, 0, 4),
        ({"lead": 16}, 0, 4),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, int], first: int, npages: int) -> None:
    source = Source(np.zeros(64 * 4096, dtype=np.uint8), 4096, np.ones(64, dtype=bool))
    page_map, _ = new_map(source, 64, 0, 16)
    for name, value in changes.items():
        setattr(page_map, name, value)
    fault = ffi.new("struct qm_fault *")
    assert lib.qm_map_pages(page_map, new_channel(), first, npages, fault) == -errno.EINVAL
