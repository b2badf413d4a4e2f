"""What a load puts into memory, from files of our own and from foreign ones."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqmigrate._core import ffi
from tests.harness import core_twin as twin
from tests.harness.examples import some
from tests.harness.kernel import (
    CHUNK,
    PAGE_SIZES,
    POISON,
    Bytes,
    File,
    Memory,
    guest,
    memfd,
    new_block,
    new_job,
    read,
    to_words,
    totals,
)
from tests.harness.strategies import page_bits

STALE = 0x77  # what memory holds before a load


def stored_pages(bits: Bytes, page_size: int, seed: int) -> Bytes:
    """What the file holds for every page: data where bits are set (at times zeros), else poison."""
    pages = guest(bits, page_size, seed).copy().reshape(len(bits), page_size)
    pages[~bits] = POISON
    pages[np.flatnonzero(bits)[3::9]] = 0
    return pages.reshape(-1)


def stale(length: int, shift: int = 0) -> Bytes:
    raw = np.frombuffer(mmap.mmap(-1, length + shift + 4096), dtype=np.uint8)
    memory = raw[shift : shift + length]
    memory[:] = STALE
    return memory


@settings(some, max_examples=80)
@given(
    st.data(),
    st.sampled_from(PAGE_SIZES),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["plain", "mapped", "file"]),
    st.sampled_from([0, 0, 8, 1024, 4097]),
    st.sampled_from([0, 1024, 4096, 65536, 128 << 10, 8 << 20]),
)
def test_read_does_what_its_twin_does(
    file: File,
    data: st.DataObject,
    page_size: int,
    direct: bool,
    zero_clear: bool,
    kind: str,
    shift: int,
    max_gap: int,
) -> None:
    chunk = CHUNK // page_size
    npages = data.draw(st.one_of(st.integers(1, 150), st.integers(chunk - 2, chunk + 80)))
    bits = data.draw(page_bits(npages))
    pages_offset = 1024 * data.draw(st.one_of(st.integers(0, 70), st.just(1024)))
    early = data.draw(st.booleans())
    pages = stored_pages(bits, page_size, seed=npages)
    stored = pages.tobytes()
    if early:
        last = np.flatnonzero(bits)[-1] + 1 if bits.any() else 0
        stored = stored[: last * page_size]
    file.fill(bytes([POISON]) * pages_offset + stored)
    length = npages * page_size
    before = stale(length, shift)

    with memfd(shift + length) as fd:
        os.pwrite(fd, before.tobytes(), shift)
        if kind == "plain":
            target = Memory(base=before)
        else:
            view = np.frombuffer(mmap.mmap(fd, shift + length), dtype=np.uint8)[shift:]
            target = Memory(base=view if kind == "mapped" else None, fd=fd, fd_offset=shift)
        expected = twin.read(before, page_size, bits, pages, zero_clear=zero_clear)
        job = new_job()
        rc = read(
            target,
            new_block(length, page_size, pages_offset),
            file.core(direct=direct),
            to_words(bits),
            max_gap=max_gap,
            zero_clear=zero_clear,
            job=job,
        )
        assert rc == 0, errno.errorcode[-rc]
        if kind == "plain":
            after = before
        else:
            after = np.frombuffer(os.pread(fd, length, shift), dtype=np.uint8)
            assert os.fstat(fd).st_size == shift + length
    assert not (after == POISON).any(), "file bytes of a clear page reached memory"
    assert (after == expected).all()
    done = totals(job)
    assert (done.data_pages, done.zero_pages) == (bits.sum(), npages - bits.sum())
    assert done.bytes_done == length
    assert done.bytes_moved >= int(bits.sum()) * page_size


@some
@given(st.data(), st.sampled_from(PAGE_SIZES))
def test_clear_pages_of_a_file_become_holes(
    file: File, data: st.DataObject, page_size: int
) -> None:
    npages = data.draw(st.integers(1, 200)) * 65536 // page_size
    bits = np.repeat(data.draw(page_bits(npages * page_size // 65536)), 65536 // page_size)
    file.fill(stored_pages(bits, page_size, seed=1).tobytes())
    length = npages * page_size
    with memfd(length) as fd:
        os.pwrite(fd, b"\x77" * length, 0)
        view = np.frombuffer(mmap.mmap(fd, length), dtype=np.uint8)
        assert (
            read(
                Memory(base=view, fd=fd),
                new_block(length, page_size, 0),
                file.core(direct=True),
                to_words(bits),
            )
            == 0
        )
        assert os.fstat(fd).st_blocks * 512 == int(bits.sum()) * page_size


def test_clear_pages_in_a_hole_are_not_touched(file: File) -> None:
    length = 8 * CHUNK
    bits = np.zeros(length // 4096, dtype=bool)
    bits[5] = True
    file.fill(bytes([POISON]) * CHUNK)
    with memfd(length) as fd:
        view = np.frombuffer(mmap.mmap(fd, length), dtype=np.uint8)
        assert (
            read(
                Memory(base=view, fd=fd),
                new_block(length, 4096, 0),
                file.core(direct=False),
                to_words(bits),
            )
            == 0
        )
        assert os.fstat(fd).st_blocks * 512 == 4096


@pytest.mark.parametrize("zero_clear", [True, False])
def test_clear_pages_are_zeroed_or_left(file: File, zero_clear: bool) -> None:
    bits = np.array([True, False, True, False])
    file.poison(4 * 4096)
    memory = stale(4 * 4096)
    assert (
        read(
            Memory(base=memory),
            new_block(4 * 4096, 4096, 0),
            file.core(direct=False),
            to_words(bits),
            zero_clear=zero_clear,
        )
        == 0
    )
    firsts = memory[::4096].tolist()
    other = 0 if zero_clear else STALE
    assert firsts == [POISON, other, POISON, other]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", ["plain", "unaligned", "file"])
@pytest.mark.parametrize("pages_offset", [0, 1024, 1 << 20])
@pytest.mark.parametrize("missing", [1, 1023, 4096, 5000])
def test_a_set_page_past_the_end_of_the_file_is_not_data(
    file: File, direct: bool, kind: str, pages_offset: int, missing: int
) -> None:
    length = 64 * 4096
    end = pages_offset + length - missing
    file.poison(end)
    fault = ffi.new("struct qm_fault *", {"in_memory": 1, "at": -1})
    with memfd(length) as fd:
        memory = {
            "plain": lambda: Memory(base=stale(length)),
            "unaligned": lambda: Memory(base=stale(length, 24)),
            "file": lambda: Memory(fd=fd),
        }[kind]()
        rc = read(
            memory,
            new_block(length, 4096, pages_offset),
            file.core(direct=direct),
            to_words(np.ones(64, dtype=bool)),
            fault=fault,
        )
    assert rc == -errno.ENODATA
    assert fault.in_memory == 0
    assert fault.at == end


def test_a_file_that_ends_before_its_clear_pages_is_whole(file: File) -> None:
    bits = np.zeros(4096, dtype=bool)
    bits[:3] = True
    file.poison(3 * 4096)
    memory = stale(4096 * 4096)
    assert (
        read(
            Memory(base=memory),
            new_block(len(memory), 4096, 0),
            file.core(direct=True),
            to_words(bits),
        )
        == 0
    )
    assert not memory[3 * 4096 :].any()


def test_short_gaps_are_read_over_and_long_ones_are_not(file: File) -> None:
    bits = np.zeros(1024, dtype=bool)
    bits[[0, 2, 4, 600]] = True
    file.poison(1024 * 4096)
    job = new_job()
    assert (
        read(
            Memory(base=stale(1024 * 4096)),
            new_block(1024 * 4096, 4096, 0),
            file.core(direct=True),
            to_words(bits),
            max_gap=4096,
            job=job,
        )
        == 0
    )
    assert totals(job).calls == 2
    assert totals(job).bytes_moved == 6 * 4096


def test_a_read_without_a_file_reports_where_it_failed(file: File) -> None:
    core = file.core(direct=False)
    core.fd = os.open(file.path, os.O_WRONLY)
    fault = ffi.new("struct qm_fault *", {"in_memory": 1, "at": -1})
    try:
        rc = read(
            Memory(base=stale(4096)),
            new_block(4096, 4096, 8192),
            core,
            to_words(np.ones(1, dtype=bool)),
            fault=fault,
        )
    finally:
        os.close(core.fd)
    assert (rc, fault.in_memory, fault.at) == (-errno.EBADF, 0, 8192)


def test_memory_that_cannot_be_written_is_a_fault_in_memory(file: File) -> None:
    file.poison(4096)
    fault = ffi.new("struct qm_fault *")
    with memfd(4096) as fd:
        readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        rc = read(
            Memory(fd=readable),
            new_block(4096, 4096, 0),
            file.core(direct=False),
            to_words(np.ones(1, dtype=bool)),
            fault=fault,
        )
        os.close(readable)
    assert (rc, fault.in_memory) == (-errno.EBADF, 1)


def test_a_file_that_became_shorter_is_a_fault_in_memory_and_does_not_grow(file: File) -> None:
    length = 2 * CHUNK
    bits = np.ones(length // 4096, dtype=bool)
    file.poison(length)
    fault = ffi.new("struct qm_fault *")
    with memfd(length) as fd:
        view = np.frombuffer(mmap.mmap(fd, length), dtype=np.uint8)
        os.ftruncate(fd, CHUNK + 4096)
        rc = read(
            Memory(base=view, fd=fd),
            new_block(length, 4096, 0),
            file.core(direct=True),
            to_words(bits),
            fault=fault,
        )
        assert rc == -errno.EFAULT
        assert (fault.in_memory, fault.at) == (1, CHUNK)
        assert os.fstat(fd).st_size == CHUNK + 4096


@pytest.mark.parametrize("advice", [mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE])
def test_direct_reads_fill_fresh_memory_of_both_page_sizes(file: File, advice: int) -> None:
    length = 2 * CHUNK
    bits = np.ones(length // 4096, dtype=bool)
    bits[700:900] = False
    pages = stored_pages(bits, 4096, seed=3)
    file.fill(pages.tobytes())
    raw = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw.madvise(advice)
    memory = np.frombuffer(raw, dtype=np.uint8)
    block = new_block(length, 4096, 0)
    assert read(Memory(base=memory), block, file.core(direct=True), to_words(bits)) == 0
    expected = pages.reshape(-1, 4096).copy()
    expected[~bits] = 0
    assert (memory.reshape(-1, 4096) == expected).all()


def test_a_direct_read_that_leaves_clear_pages_makes_only_set_pages_present(file: File) -> None:
    length = 2 * CHUNK
    bits = np.zeros(length // 4096, dtype=bool)
    bits[[5, 1030]] = True
    file.poison(length)
    raw = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw.madvise(mmap.MADV_NOHUGEPAGE)
    memory = np.frombuffer(raw, dtype=np.uint8)
    block = new_block(length, 4096, 0)
    source = file.core(direct=True)
    assert read(Memory(base=memory), block, source, to_words(bits), zero_clear=False) == 0
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(memory.ctypes.data // 4096 * 8)
        words = np.frombuffer(pagemap.read(len(bits) * 8), dtype=np.uint64)
    assert (np.flatnonzero(words >> np.uint64(63)) == [5, 1030]).all()


def test_memory_that_becomes_unwritable_after_a_chunk_is_a_fault_in_memory(file: File) -> None:
    length = 2 * CHUNK
    bits = np.ones(length // 4096, dtype=bool)
    file.poison(length)
    fault = ffi.new("struct qm_fault *")
    raw = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = np.frombuffer(raw, dtype=np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(memory.ctypes.data + CHUNK, CHUNK, mmap.PROT_READ) == 0
    rc = read(
        Memory(base=memory),
        new_block(length, 4096, 0),
        file.core(direct=True),
        to_words(bits),
        fault=fault,
    )
    assert (rc, fault.in_memory, fault.at) == (-errno.EFAULT, 1, CHUNK)
