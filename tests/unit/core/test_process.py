"""The core reads another process: all of its memory, and where there is none."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from pyqmigrate.io.process_memory import ProcessSource
from tests.harness.examples import some
from tests.harness.processes import PAGE, Holder

PAGES = 4096  # 16 MiB: several words of pagemap at once, several chunks
PRIVATE = mmap.MAP_PRIVATE
TOUCHED = sorted({0, 1, 2, 511, 512, 513, 700, 1500, *range(2000, 2100), 3999})
LOOKED_AT = (5, 1000, 3000)


@pytest.fixture(scope="module")
def holder() -> Iterator[Holder]:
    with Holder(PAGES, TOUCHED, flags=PRIVATE, looked_at=LOOKED_AT) as holder:
        yield holder


@pytest.fixture(scope="module")
def source(holder: Holder) -> Iterator[ProcessSource]:
    source = ProcessSource(holder.memory)
    assert source.skips
    yield source
    source.close()


def fill(core: Any, offset: int, length: int) -> tuple[int, bytes]:
    buffer = ffi.new("unsigned char[]", length)
    got = lib.qm_process_fill(core, buffer, offset, length)
    return got, bytes(ffi.buffer(buffer))[: max(got, 0)]


@some
@given(st.integers(0, PAGES * PAGE - 1), st.integers(1, 3 << 20))
def test_any_range_reads_as_the_process_has_it(
    holder: Holder, source: ProcessSource, offset: int, length: int
) -> None:
    length = min(length, PAGES * PAGE - offset)
    got, data = fill(source.core, offset, length)
    assert got == length
    assert data == holder.content[offset : offset + length].tobytes()


def first_touched(present: Any, offset: int, end: int) -> int:
    """The twin: the first byte from ``offset`` in a page that is there."""
    for page in range(offset // PAGE, -(-end // PAGE)):
        if present[page]:
            return max(page * PAGE, offset)
    return end


@pytest.fixture(params=["ranges", "words"])
def finder(request: pytest.FixtureRequest, holder: Holder) -> Iterator[ProcessSource]:
    """A source that asks the pagemap in one of the two ways, of a process nobody read before."""
    with Holder(PAGES, TOUCHED, flags=PRIVATE, looked_at=LOOKED_AT) as fresh:
        source = ProcessSource(fresh.memory)
        if request.param == "words":
            source.core.has_scan = 0
        elif not source.core.has_scan:
            pytest.skip("this kernel has no PAGEMAP_SCAN")
        yield source
        source.close()


def test_next_touched_page_is_found_from_everywhere(finder: ProcessSource) -> None:
    touched = np.zeros(PAGES, dtype=bool)
    touched[TOUCHED] = True
    if not finder.core.has_scan:
        touched[[*LOOKED_AT, PAGES - 1]] = True  # zero pages are there too, and so say the words
    rng = np.random.default_rng(1)
    for offset in [0, PAGE - 1, *rng.integers(0, PAGES * PAGE, 300).tolist()]:
        end = int(rng.integers(offset, PAGES * PAGE + 1))
        expected = first_touched(touched, offset, end) if offset < end else end
        assert lib.qm_process_next(finder.core, offset, end) == min(expected, end), (offset, end)


def test_address_within_a_page_is_harmless(holder: Holder) -> None:
    memory = holder.memory
    shifted = type(memory)(memory.pid, memory.address + 1024, memory.length - 1024)
    source = ProcessSource(shifted)
    try:
        assert fill(source.core, 0, 8192)[1] == holder.content[1024 : 1024 + 8192].tobytes()
        assert lib.qm_process_next(source.core, 0, 4096) == 0
        third = 3 * PAGE - 1024  # the first page nobody touched
        assert lib.qm_process_next(source.core, third, 511 * PAGE) == 511 * PAGE - 1024
    finally:
        source.close()


def test_memory_that_ends_says_where() -> None:
    with Holder(64, range(64), flags=PRIVATE, unmapped=40 * PAGE) as holder:
        source = ProcessSource(holder.memory)
        assert fill(source.core, 0, 64 * PAGE)[0] == 40 * PAGE
        assert fill(source.core, 40 * PAGE, PAGE)[0] == -errno.EFAULT
        source.close()


def test_process_that_ended_is_gone() -> None:
    with Holder(64, range(64), flags=PRIVATE) as holder:
        source = ProcessSource(holder.memory)
        holder.end()
        assert fill(source.core, 0, PAGE)[0] == -errno.ESRCH
        source.close()


def test_process_that_was_not_reaped_yet_is_gone_too() -> None:
    with Holder(64, range(64), flags=PRIVATE) as holder:
        source = ProcessSource(holder.memory)
        holder.process.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        assert fill(source.core, 0, PAGE)[0] == -errno.ESRCH
        source.close()


def test_number_that_became_another_process_s_is_not_read() -> None:
    with Holder(64, range(64), flags=PRIVATE) as old, Holder(64, range(64), flags=PRIVATE) as new:
        source = ProcessSource(old.memory)
        old.end()
        source.core.pid, source.core.address = new.pid, new.address
        assert fill(source.core, 0, PAGE)[0] == -errno.ESRCH
        source.close()


@pytest.mark.parametrize("way", ["ranges", "words"])
def test_memory_of_a_process_that_is_ending_is_not_taken_for_zeros(way: str) -> None:
    """Its pages go first, and for a while it is still there."""
    for _ in range(20):
        with Holder(PAGES, range(PAGES), flags=PRIVATE) as holder:
            source = ProcessSource(holder.memory)
            source.core.has_scan = source.core.has_scan and way == "ranges"
            holder.process.kill()
            for _ in range(200):
                assert lib.qm_process_next(source.core, PAGE, 2 * PAGE) == PAGE
            source.close()


def test_pagemap_of_a_process_that_ended_skips_nothing(finder: ProcessSource) -> None:
    start = 1600 * PAGE
    assert lib.qm_process_next(finder.core, start, 2000 * PAGE) == 2000 * PAGE
    os.kill(finder.core.pid, 9)
    os.waitid(os.P_PID, finder.core.pid, os.WEXITED | os.WNOWAIT)
    assert lib.qm_process_next(finder.core, start, 2000 * PAGE) == start


@pytest.mark.parametrize("way", ["ranges", "words", "no pagemap"])
def test_memory_of_our_own_that_was_touched_is_found(way: str) -> None:
    pages = [3, 4, 600, 4000]
    memory = mmap.mmap(-1, PAGES * PAGE, flags=PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(memory, "madvise"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    for page in pages:
        memory[page * PAGE] = 1
    base = ffi.from_buffer("unsigned char[]", memory)
    pagemap = -1 if way == "no pagemap" else os.open("/proc/self/pagemap", os.O_RDONLY)

    def next_touched(start: int, end: int = PAGES * PAGE) -> int:
        return int(lib.qm_next_touched(pagemap, way == "ranges", base, start, end))

    try:
        for start in (0, 1, 3 * PAGE, 3 * PAGE + 5, 4 * PAGE, 5 * PAGE, 601 * PAGE, 4001 * PAGE):
            expected = min(
                (max(page * PAGE, start) for page in pages if (page + 1) * PAGE > start),
                default=PAGES * PAGE,
            )
            assert next_touched(start) == (start if way == "no pagemap" else expected)
        if way != "no pagemap":
            assert next_touched(5 * PAGE, 600 * PAGE) == 600 * PAGE
            assert next_touched(5 * PAGE, 100 * PAGE + 7) == 100 * PAGE + 7
    finally:
        if pagemap >= 0:
            os.close(pagemap)
        ffi.release(base)
        memory.close()
