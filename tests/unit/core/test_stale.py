"""Old bytes under clear bits are found, and become zeros."""

from __future__ import annotations

import errno
from typing import Any

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
    Transfer,
    guest,
    new_block,
    new_channel,
    new_job,
    to_words,
)
from tests.harness.strategies import page_bits


def punch(file: File, block: Any, words: Any, job: Any = None) -> int:
    """qm_stale_punch over a whole block."""
    transfer = Transfer(job or new_job(), block, file=file.core(direct=False), data=words)
    npages = block.len // block.page_size
    fault = ffi.new("struct qm_fault *")
    return int(lib.qm_stale_punch(transfer.core, new_channel(), 0, npages, fault))


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

    block = new_block(len(pages), page_size, pages_offset)
    found = punch(file, block, to_words(bits))

    assert found == (stale & ~bits).sum()
    after = file.read(pages_offset, len(pages))
    assert (twin.scan(after, page_size) == (stale & bits)).all()
    kept = np.repeat(bits, page_size)
    assert (after[kept] == pages[kept]).all()
    assert (file.read(0, pages_offset) == POISON).all()
    assert (file.read(pages_offset + len(pages), 4096) == POISON).all()


def test_a_file_that_ends_early_has_nothing_stale_after_its_end(file: File) -> None:
    file.poison(3 * 4096 + 5)
    block = new_block(8 * CHUNK, 4096, 4096)
    found = punch(file, block, ffi.new("uint64_t[]", 8 * CHUNK // 4096 // 64))
    assert found == 3
    assert not file.read(4096, 2 * 4096 + 5).any()


def test_a_cancelled_job_cleans_nothing(file: File) -> None:
    file.poison(1 << 20)
    job = new_job()
    lib.qm_job_cancel(job)
    block = new_block(1 << 20, 4096, 0)
    assert punch(file, block, ffi.new("uint64_t[4]"), job) == -errno.ECANCELED
    assert (file.read(0, 1 << 20) == POISON).all()
