"""Which bytes of the file a save writes, and which bits it sets."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from tests.harness import core_twin as twin
from tests.harness.examples import some
from tests.harness.kernel import (
    AUTO,
    CHUNK,
    DENSE,
    DIRECT_UNIT,
    EXACT,
    PAGE_SIZES,
    POISON,
    POLICIES,
    Bits,
    Bytes,
    File,
    Memory,
    Transfer,
    guest,
    new_block,
    new_channel,
    new_job,
    new_policy,
    to_bits,
    to_words,
    totals,
    write,
)
from tests.harness.strategies import page_bits

PAGES_OFFSET = 1 << 20


def written_bytes(file: File, memory: Bytes) -> Bits:
    """Which bytes of a poisoned file the save wrote; fails where they are not the guest's."""
    content = file.read(PAGES_OFFSET, len(memory))
    touched = content != POISON
    assert (content[touched] == memory[touched]).all(), "bytes that are not the guest's"
    before = file.read(0, PAGES_OFFSET)
    assert (before == POISON).all(), "bytes before the pages were written"
    after = file.read(PAGES_OFFSET + len(memory), 1 << 17)
    assert (after == POISON).all(), "bytes after the pages were written"
    return touched


def lengths(page_size: int) -> st.SearchStrategy[int]:
    """Numbers of pages: a few, or around one and two chunks."""
    chunk = CHUNK // page_size
    return st.one_of(
        st.integers(1, 150),
        st.integers(chunk - 3, chunk + 70),
        st.integers(2 * chunk - 2, 2 * chunk + 3),
    )


@settings(some, max_examples=60)
@given(
    st.data(),
    st.sampled_from(PAGE_SIZES),
    st.sampled_from(sorted(POLICIES)),
    st.booleans(),
    st.sampled_from([0, 0, 0, 8, 512, 1031]),
    st.booleans(),
)
def test_write_does_what_its_twin_does(
    file: File,
    data: st.DataObject,
    page_size: int,
    policy: str,
    direct: bool,
    shift: int,
    selecting: bool,
) -> None:
    npages = data.draw(lengths(page_size))
    bits = data.draw(page_bits(npages))
    selection = data.draw(page_bits(npages)) if selecting else np.ones(npages, dtype=bool)
    prior = data.draw(page_bits(npages))
    memory = guest(bits, page_size, seed=npages, shift=shift)
    unit = DIRECT_UNIT if direct else 1
    file.poison(PAGES_OFFSET + len(memory) + (1 << 17))
    words = to_words(prior)
    job = new_job()

    rc = write(
        Memory(base=memory),
        new_block(len(memory), page_size, PAGES_OFFSET),
        file.core(direct=direct),
        POLICIES[policy],
        words,
        job=job,
        step=data.draw(st.integers(1, 3)),
        selection=to_words(selection) if selecting else ffi.NULL,
    )

    assert rc == 0
    expected, pages = twin.write(
        memory,
        page_size,
        POLICIES[policy],
        selection=selection,
        prior=prior,
        direct_len=len(memory) // unit * unit,
    )
    assert (to_bits(words, npages) == expected).all()
    touched = written_bytes(file, memory)
    by_page = touched.reshape(npages, page_size)
    if page_size >= unit:
        assert (by_page.all(axis=1) == pages).all(), "other pages were written than planned"
        assert (by_page.any(axis=1) == pages).all(), "a page was written in part"
    else:
        assert by_page[pages].all(), "a page was left out"
        assert (by_page.any(axis=1) == by_page.all(axis=1)).all(), "a page was written in part"
    done = totals(job)
    assert done.bytes_done == int(selection.sum()) * page_size
    assert done.data_pages == int((selection & bits).sum())
    assert done.zero_pages == int((selection & ~bits).sum())
    assert done.bytes_moved == touched.sum()


@some
@given(st.data(), st.sampled_from([1024, 2048]), st.sampled_from(["auto", "exact"]))
def test_pages_below_the_unit_cost_their_units_and_the_share_of_them(
    file: File, data: st.DataObject, page_size: int, policy: str
) -> None:
    npages = data.draw(lengths(page_size))
    bits = data.draw(page_bits(npages))
    memory = guest(bits, page_size, seed=npages)
    file.poison(PAGES_OFFSET + len(memory) + (1 << 17))
    words = to_words(np.zeros(npages, dtype=bool))

    assert (
        write(
            Memory(base=memory),
            new_block(len(memory), page_size, PAGES_OFFSET),
            file.core(direct=True),
            POLICIES[policy],
            words,
        )
        == 0
    )

    direct_len = len(memory) // DIRECT_UNIT * DIRECT_UNIT
    written = written_bytes(file, memory)[:direct_len]
    units = (
        np.add.reduceat(
            np.repeat(bits, page_size)[:direct_len], np.arange(0, direct_len, DIRECT_UNIT)
        )
        > 0
        if direct_len
        else np.zeros(0, dtype=bool)
    )
    share = POLICIES[policy][1]
    for first in range(0, len(units), CHUNK // DIRECT_UNIT):
        part = slice(first, first + CHUNK // DIRECT_UNIT)
        spent = written[first * DIRECT_UNIT : first * DIRECT_UNIT + CHUNK].sum() // DIRECT_UNIT
        needed = units[part].sum()
        assert spent <= needed + needed * share / 100


@some
@given(st.data(), st.sampled_from([4096, 8192, 65536]))
def test_exact_allocates_no_zero_page(file: File, data: st.DataObject, page_size: int) -> None:
    npages = data.draw(lengths(page_size))
    bits = data.draw(page_bits(npages))
    memory = guest(bits, page_size)
    file.holes(PAGES_OFFSET + len(memory))
    words = to_words(np.zeros(npages, dtype=bool))
    assert (
        write(
            Memory(base=memory),
            new_block(len(memory), page_size, PAGES_OFFSET),
            file.core(direct=True),
            EXACT,
            words,
        )
        == 0
    )
    allocated = file.allocated(PAGES_OFFSET, len(memory)).reshape(npages, -1)
    assert (allocated.any(axis=1) == bits).all()


@some
@given(st.data(), st.booleans())
def test_auto_allocates_at_most_half_as_much_again_in_every_chunk(
    file: File, data: st.DataObject, direct: bool
) -> None:
    npages = data.draw(lengths(4096))
    bits = data.draw(page_bits(npages))
    memory = guest(bits, 4096)
    file.holes(PAGES_OFFSET + len(memory))
    words = to_words(np.zeros(npages, dtype=bool))
    assert (
        write(
            Memory(base=memory),
            new_block(len(memory), 4096, PAGES_OFFSET),
            file.core(direct=direct),
            AUTO,
            words,
        )
        == 0
    )
    assert (to_bits(words, npages) == bits).all(), "the bit of a bridged zero page was set"
    allocated = file.allocated(PAGES_OFFSET, len(memory))
    assert allocated[bits].all()
    for first in range(0, npages, CHUNK // 4096):
        part = slice(first, first + CHUNK // 4096)
        assert allocated[part].sum() <= bits[part].sum() * 1.5


def test_auto_bridges_single_zero_pages_of_speckled_memory(file: File) -> None:
    npages = 4 * CHUNK // 4096
    bits = np.random.default_rng(1).random(npages) >= 0.3
    memory = guest(bits, 4096)
    job = new_job()
    assert (
        write(
            Memory(base=memory),
            new_block(len(memory), 4096, PAGES_OFFSET),
            file.core(direct=True),
            AUTO,
            to_words(bits),
            job=job,
        )
        == 0
    )
    assert totals(job).calls <= 16, "speckled memory must leave in few, large writes"


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_page_outside_the_selection_keeps_its_bit_though_it_is_bridged(
    file: File, policy: str
) -> None:
    bits = np.ones(64, dtype=bool)
    memory = guest(bits, 4096)
    selection = np.ones(64, dtype=bool)
    selection[10] = selection[20] = False
    prior = np.zeros(64, dtype=bool)
    prior[20] = True
    words = to_words(prior)
    assert (
        write(
            Memory(base=memory),
            new_block(len(memory), 4096, PAGES_OFFSET),
            file.core(direct=True),
            POLICIES[policy],
            words,
            selection=to_words(selection),
        )
        == 0
    )
    expected = selection.copy()
    expected[20] = True
    assert (to_bits(words, 64) == expected).all()


def test_a_selected_page_that_became_zero_loses_its_bit(file: File) -> None:
    memory = guest(np.zeros(8, dtype=bool), 4096)
    words = to_words(np.ones(8, dtype=bool))
    selection = np.array([1, 0, 1, 0, 1, 0, 1, 0], dtype=bool)
    assert (
        write(
            Memory(base=memory),
            new_block(len(memory), 4096, PAGES_OFFSET),
            file.core(direct=False),
            EXACT,
            words,
            selection=to_words(selection),
        )
        == 0
    )
    assert (to_bits(words, 8) == ~selection).all()


@some
@given(st.data(), st.sampled_from([1024, 2048]), st.booleans())
def test_the_tail_waits_for_its_own_call(
    file: File, data: st.DataObject, page_size: int, dense: bool
) -> None:
    per_unit = DIRECT_UNIT // page_size
    npages = data.draw(st.integers(1, 40)) * per_unit + data.draw(st.integers(1, per_unit - 1))
    bits = np.ones(npages, dtype=bool)
    bits[-1] = data.draw(st.booleans())
    memory = guest(bits, page_size)
    block = new_block(len(memory), page_size, PAGES_OFFSET)
    file.poison(PAGES_OFFSET + len(memory) + (1 << 17))
    words = to_words(np.zeros(npages, dtype=bool))
    policy = DENSE if dense else EXACT
    direct_len = len(memory) // DIRECT_UNIT * DIRECT_UNIT
    core = file.core(direct=True)

    assert write(Memory(base=memory), block, core, policy, words, tail=False) == 0
    assert not written_bytes(file, memory)[direct_len:].any()
    assert not to_bits(words, npages)[direct_len // page_size :].any()

    source = Memory(base=memory)
    transfer = Transfer(
        new_job(), block, file=core, memory=source.core, policy=new_policy(policy), data=words
    )
    fault = ffi.new("struct qm_fault *")
    assert lib.qm_write_tail(transfer.core, new_channel(), fault) == 0
    tail = written_bytes(file, memory)[direct_len:].reshape(-1, page_size)
    assert (tail.all(axis=1) == bits[direct_len // page_size :] | dense).all()
    assert (to_bits(words, npages) == bits).all()


def test_pages_that_no_direct_write_can_reach_go_through_the_buffered_descriptor(
    file: File,
) -> None:
    memory = guest(np.ones(64, dtype=bool), 4096)
    file.poison(PAGES_OFFSET + len(memory) + (1 << 17))
    words = to_words(np.zeros(64, dtype=bool))
    block = new_block(len(memory), 4096, PAGES_OFFSET + 1024)
    assert write(Memory(base=memory), block, file.core(direct=True), AUTO, words) == 0
    assert (file.read(PAGES_OFFSET + 1024, len(memory)) == memory).all()


def test_without_a_file_pages_are_counted_and_nothing_is_written(file: File) -> None:
    bits = np.array([True, False] * 40)
    memory = guest(bits, 1024)
    file.poison(PAGES_OFFSET + len(memory) + (1 << 17))
    core = file.core(direct=True)
    core.fd = -1
    words = to_words(np.zeros(80, dtype=bool))
    job = new_job()
    assert (
        write(
            Memory(base=memory),
            new_block(len(memory), 1024, PAGES_OFFSET),
            core,
            AUTO,
            words,
            job=job,
        )
        == 0
    )
    assert (to_bits(words, 80) == bits).all()
    assert totals(job).data_pages == 40
    assert totals(job).bytes_moved == 0
    assert not written_bytes(file, memory).any()


@pytest.mark.parametrize(
    ("length", "page_size", "pages_offset", "first", "npages"),
    [
        (8192, 3000, 0, 0, 1),
        (8192, 512, 0, 0, 1),
        (8192, 1 << 17, 0, 0, 0),
        (8193, 4096, 0, 0, 1),
        (8192, 4096, -4096, 0, 1),
        (8192, 4096, (1 << 63) - 8192, 0, 1),
        (8192, 4096, 0, 0, 3),
        (8192, 4096, 0, 1, 1),
        (1 << 23, 4096, 0, 64, 64),
        (8192, 4096, 0, 1 << 63, 1),
        (8192, 4096, 0, 0, (1 << 64) - 1),
        ((1 << 64) - 4096, 4096, 0, 0, 1),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(
    file: File, length: int, page_size: int, pages_offset: int, first: int, npages: int
) -> None:
    memory = Memory(base=np.zeros(8192, dtype=np.uint8))
    words = ffi.new("uint64_t[64]")
    block = new_block(length, page_size, pages_offset)
    fault = ffi.new("struct qm_fault *")
    transfer = Transfer(
        new_job(),
        block,
        file=file.core(direct=False),
        memory=memory.core,
        policy=new_policy(AUTO),
        data=words,
    )
    for function in (lib.qm_write, lib.qm_read):
        assert function(transfer.core, new_channel(), first, npages, fault) == -errno.EINVAL


@pytest.mark.parametrize("align", [0, 3, 4097, 1 << 17])
def test_an_alignment_that_is_none_is_refused(file: File, align: int) -> None:
    memory = Memory(base=np.zeros(8192, dtype=np.uint8))
    block = new_block(8192, 4096, 0)
    words = ffi.new("uint64_t[1]")
    for mem_align, off_align in [(align, 4096), (4096, align)]:
        core = file.core(direct=True, mem_align=mem_align, off_align=off_align)
        assert write(memory, block, core, AUTO, words) == -errno.EINVAL


def test_a_position_is_reported_where_the_file_cannot_be_written(file: File) -> None:
    memory = guest(np.ones(64, dtype=bool), 4096)
    core = file.core(direct=False)
    core.fd = os.open(file.path, os.O_RDONLY)
    fault = ffi.new("struct qm_fault *", {"in_memory": 1, "at": -1})
    try:
        rc = write(
            Memory(base=memory),
            new_block(len(memory), 4096, PAGES_OFFSET),
            core,
            AUTO,
            ffi.new("uint64_t[1]"),
            fault=fault,
        )
    finally:
        os.close(core.fd)
    assert rc == -errno.EBADF
    assert (fault.in_memory, fault.at) == (0, PAGES_OFFSET)


def test_direct_alignment_of_a_disk_is_reported(file: File, disk: Path) -> None:
    mem, off = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    rc = lib.qm_direct_align(file.fd, mem, off)
    if rc in (-errno.ENOSYS, -errno.EOPNOTSUPP):
        pytest.skip("the kernel or the file system does not tell")
    assert rc == 0
    for value in (mem[0], off[0]):
        assert value.bit_count() == 1
        assert value <= lib.QM_MAX_PAGE


def test_direct_alignment_of_a_closed_descriptor_is_an_error() -> None:
    mem, off = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    assert lib.qm_direct_align(-1, mem, off) == -errno.EBADF


def test_direct_writes_are_not_buffered_on_tmpfs_nor_without_a_file(shm: Path) -> None:
    fd = os.open(shm, os.O_RDWR | os.O_TMPFILE)
    try:
        assert lib.qm_buffers_direct_writes(fd) == 0
    finally:
        os.close(fd)
    assert lib.qm_buffers_direct_writes(-1) == 0
