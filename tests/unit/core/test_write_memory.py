"""Saves from every kind of memory: plain, unaligned, files that may shrink, memfds, callbacks."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqmigrate._core import ffi
from tests.harness.examples import some
from tests.harness.kernel import (
    AUTO,
    CHUNK,
    DENSE,
    EXACT,
    PAGE_SIZES,
    POISON,
    POLICIES,
    Bits,
    File,
    Memory,
    fill_from,
    guest,
    mapped,
    memfd,
    new_block,
    read,
    store,
    to_bits,
    to_words,
    write,
)
from tests.harness.strategies import page_bits

PAGES_OFFSET = 1 << 20
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def save(
    file: File,
    memory: Memory,
    bits: Bits,
    page_size: int,
    policy: str,
    direct: bool,
    mem_align: int = 4096,
    off_align: int = 4096,
) -> tuple[Any, Bits]:
    length = len(bits) * page_size
    file.poison(PAGES_OFFSET + length)
    words = to_words(np.zeros(len(bits), dtype=bool))
    rc = write(
        memory,
        new_block(length, page_size, PAGES_OFFSET),
        file.core(direct=direct, mem_align=mem_align, off_align=off_align),
        POLICIES[policy],
        words,
    )
    assert rc == 0, errno.errorcode[-rc]
    return file.read(PAGES_OFFSET, length), to_bits(words, len(bits))


@settings(some, max_examples=60)
@given(
    st.data(),
    st.sampled_from(PAGE_SIZES),
    st.sampled_from(sorted(POLICIES)),
    st.booleans(),
    st.sampled_from(["shrinkable", "sealed", "callback", "odd"]),
    st.sampled_from([0, 4096, 1024, 12345]),
)
def test_every_kind_of_memory_gives_the_file_that_plain_memory_gives(
    file: File,
    data: st.DataObject,
    page_size: int,
    policy: str,
    direct: bool,
    kind: str,
    offset: int,
) -> None:
    chunk = CHUNK // page_size
    npages = data.draw(st.one_of(st.integers(1, 100), st.integers(chunk, chunk + 80)))
    bits = data.draw(page_bits(npages))
    memory = guest(bits, page_size, seed=npages)
    expected, expected_bits = save(file, Memory(base=memory), bits, page_size, policy, direct)
    assert (expected_bits == bits).all()

    with memfd(offset + len(memory), SEALS) as fd:
        store(fd, memory, offset)
        blocks = os.fstat(fd).st_blocks
        if kind == "shrinkable":
            got = save(file, Memory(fd=fd, fd_offset=offset), bits, page_size, policy, direct)
        elif kind == "sealed":
            view = mapped(fd, offset, len(memory))
            got = save(
                file, Memory(base=view, fd=fd, fd_offset=offset), bits, page_size, policy, direct
            )
        elif kind == "callback":
            fill = fill_from(memory)
            got = save(file, Memory(fill=fill), bits, page_size, policy, direct)
        else:
            shifted = guest(bits, page_size, seed=npages, shift=offset % 4096 + 8)
            got = save(file, Memory(base=shifted), bits, page_size, policy, direct)
        if page_size == 4096 and offset % 4096 == 0:
            assert os.fstat(fd).st_blocks == blocks, "holes of the memfd became resident"

    assert (got[1] == expected_bits).all()
    written = got[0] != POISON
    assert (written == (expected != POISON)).all()
    assert (got[0] == expected).all()


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_holes_of_a_sealed_memfd_stay_holes(file: File, page_size: int, policy: str) -> None:
    length = 6 << 20
    with memfd(length, SEALS) as fd:
        for at in [0, 70 << 10, 1 << 20, (4 << 20) - 4096, 5 << 20]:
            os.pwrite(fd, b"\x01" * 4096, at)
        blocks = os.fstat(fd).st_blocks
        view = mapped(fd, 0, length)
        words = to_words(np.zeros(length // page_size, dtype=bool))
        assert (
            write(
                Memory(base=view, fd=fd),
                new_block(length, page_size, PAGES_OFFSET),
                file.core(direct=True),
                POLICIES[policy],
                words,
            )
            == 0
        )
        assert os.fstat(fd).st_blocks == blocks


def test_pages_that_appear_in_a_hole_before_their_chunk_are_saved(file: File) -> None:
    length = 2 * CHUNK
    with memfd(length, SEALS) as fd:
        view = mapped(fd, 0, length)
        memory = Memory(base=view, fd=fd)
        words = to_words(np.zeros(length // 4096, dtype=bool))
        block = new_block(length, 4096, PAGES_OFFSET)
        assert write(memory, block, file.core(direct=True), AUTO, words) == 0
        os.pwrite(fd, b"\x05" * 4096, CHUNK + 8192)
        assert write(memory, block, file.core(direct=True), AUTO, words) == 0
    assert np.flatnonzero(to_bits(words, length // 4096)).tolist() == [CHUNK // 4096 + 2]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("left", [0, 4096, CHUNK - 4096, CHUNK, CHUNK + 4096, CHUNK + 5000])
@pytest.mark.parametrize("hole_at_end", [False, True])
def test_a_file_that_became_shorter_is_a_fault_in_memory(
    file: File, left: int, policy: str, direct: bool, hole_at_end: bool
) -> None:
    """What has gone must never come out as pages that are zero."""
    length = 2 * CHUNK
    with memfd(length) as fd:
        os.pwrite(fd, b"\x07" * (4096 if hole_at_end else length), 0)
        memory = Memory(fd=fd)
        os.ftruncate(fd, left)
        fault = ffi.new("struct qm_fault *")
        rc = write(
            memory,
            new_block(length, 4096, PAGES_OFFSET),
            file.core(direct=direct),
            POLICIES[policy],
            to_words(np.zeros(length // 4096, dtype=bool)),
            fault=fault,
        )
    assert rc == -errno.EFAULT
    assert fault.in_memory == 1
    assert left // CHUNK * CHUNK <= fault.at <= max(left, left // CHUNK * CHUNK + CHUNK)


def test_a_callback_that_fails_ends_the_save_with_its_error(file: File) -> None:
    memory = guest(np.ones(2048, dtype=bool), 4096)
    fill = fill_from(memory, end=CHUNK + 4096, error=errno.ESRCH)
    fault = ffi.new("struct qm_fault *")
    rc = write(
        Memory(fill=fill),
        new_block(len(memory), 4096, PAGES_OFFSET),
        file.core(direct=True),
        AUTO,
        ffi.new("uint64_t[32]"),
        fault=fault,
    )
    assert rc == -errno.ESRCH
    assert fault.in_memory == 1
    assert CHUNK <= fault.at <= CHUNK + 4096


def test_a_callback_whose_memory_ends_early_is_a_fault_in_memory(file: File) -> None:
    memory = guest(np.ones(2048, dtype=bool), 4096)
    fill = fill_from(memory, end=CHUNK + 5000)
    fault = ffi.new("struct qm_fault *")
    rc = write(
        Memory(fill=fill),
        new_block(len(memory), 4096, PAGES_OFFSET),
        file.core(direct=True),
        AUTO,
        ffi.new("uint64_t[32]"),
        fault=fault,
    )
    assert (rc, fault.in_memory, fault.at) == (-errno.EFAULT, 1, CHUNK + 5000)


@pytest.mark.parametrize("page_size", [1024, 4096, 16384])
@pytest.mark.parametrize("mem_align", [4096, 65536])
@pytest.mark.parametrize("kind", ["plain", "callback", "sealed"])
@pytest.mark.parametrize("policy", [EXACT, AUTO, DENSE])
def test_memory_alignment_above_the_unit_does_not_mix_up_pages(
    file: File, kind: str, mem_align: int, page_size: int, policy: tuple[int, int, int]
) -> None:
    npages = CHUNK // page_size
    bits = np.zeros(npages, dtype=bool)
    bits[200::8] = bits[201::8] = True
    bits[1:180] = True
    memory = guest(bits, page_size)
    with memfd(len(memory), SEALS) as fd:
        store(fd, memory)
        source = {
            "plain": lambda: Memory(base=memory),
            "callback": lambda: Memory(fill=fill_from(memory)),
            "sealed": lambda: Memory(base=mapped(fd, 0, len(memory)), fd=fd),
        }[kind]()
        file.poison(PAGES_OFFSET + len(memory))
        words = to_words(np.zeros(npages, dtype=bool))
        off_align = 4096
        rc = write(
            source,
            new_block(len(memory), page_size, PAGES_OFFSET),
            file.core(direct=True, mem_align=mem_align, off_align=off_align),
            policy,
            words,
        )
    assert rc == 0
    content = file.read(PAGES_OFFSET, len(memory)).reshape(npages, page_size)
    assert (content[bits] == memory.reshape(npages, page_size)[bits]).all()


def test_memory_that_is_not_mapped_is_a_fault_in_memory_not_a_crash(file: File) -> None:
    """A mapping behind a file that shrank, with nobody looking: only the kernel touches it."""
    length = 1 << 20
    with memfd(length) as fd:
        os.pwrite(fd, b"\x09" * length, 0)
        view = mapped(fd, 0, length)
        os.ftruncate(fd, 0)
        fault = ffi.new("struct qm_fault *")
        words = to_words(np.ones(length // 4096, dtype=bool))
        # A load: the kernel writes through the mapping, and finds no page there.
        file.poison(PAGES_OFFSET + length)
        rc = read(
            Memory(base=view, fd=fd),
            new_block(length, 4096, PAGES_OFFSET),
            file.core(direct=False),
            words,
            fault=fault,
        )
    assert rc == -errno.EFAULT
    assert fault.in_memory == 1
