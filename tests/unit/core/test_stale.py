"""Old bytes under clear bits are found, and become zeros."""

from __future__ import annotations

import errno

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from tests.harness import core_twin as twin
from tests.harness.examples import some
from tests.harness.kernel import (
    CHUNK,
    PAGE_SIZES,
    POISON,
    File,
    guest,
    new_block,
    new_channel,
    new_job,
    page_bits,
    to_words,
)


@some
@given(st.data(), st.sampled_from(PAGE_SIZES), st.sampled_from([0, 1024, 1 << 20]))
def test_stale_pages_become_zero_and_set_pages_stay(
    file: File, data: st.DataObject, page_size: int, pages_offset: int
) -> None:
    chunk = CHUNK // page_size
    npages = data.draw(st.one_of(st.integers(1, 150), st.integers(chunk, chunk + 80)))
    stale = data.draw(page_bits(npages))
    bits = data.draw(page_bits(npages))
    pages = guest(stale, page_size, seed=npages)
    file.holes(pages_offset + len(pages) + 4096)
    for start in range(0, len(pages), 65536):
        if pages[start : start + 65536].any():
            file.write_at(pages_offset + start, pages[start : start + 65536].tobytes())
    file.write_at(0, bytes([POISON]) * pages_offset)
    file.write_at(pages_offset + len(pages), bytes([POISON]) * 4096)

    found = lib.qm_stale_punch(
        new_job(),
        new_channel(),
        file.core(direct=False),
        new_block(len(pages), page_size, pages_offset),
        to_words(bits),
        0,
        npages,
        ffi.new("struct qm_fault *"),
    )

    assert found == (stale & ~bits).sum()
    after = file.read(pages_offset, len(pages))
    assert (twin.scan(after, page_size) == (stale & bits)).all()
    kept = np.repeat(bits, page_size)
    assert (after[kept] == pages[kept]).all()
    assert (file.read(0, pages_offset) == POISON).all()
    assert (file.read(pages_offset + len(pages), 4096) == POISON).all()


def test_a_file_that_ends_early_has_nothing_stale_after_its_end(file: File) -> None:
    file.poison(3 * 4096 + 5)
    found = lib.qm_stale_punch(
        new_job(),
        new_channel(),
        file.core(direct=False),
        new_block(8 * CHUNK, 4096, 4096),
        ffi.new("uint64_t[]", 8 * CHUNK // 4096 // 64),
        0,
        8 * CHUNK // 4096,
        ffi.new("struct qm_fault *"),
    )
    assert found == 3
    assert not file.read(4096, 2 * 4096 + 5).any()


def test_a_cancelled_job_cleans_nothing(file: File) -> None:
    file.poison(1 << 20)
    job = new_job()
    lib.qm_job_cancel(job)
    assert (
        lib.qm_stale_punch(
            job,
            new_channel(),
            file.core(direct=False),
            new_block(1 << 20, 4096, 0),
            ffi.new("uint64_t[4]"),
            0,
            256,
            ffi.new("struct qm_fault *"),
        )
        == -errno.ECANCELED
    )
    assert (file.read(0, 1 << 20) == POISON).all()
