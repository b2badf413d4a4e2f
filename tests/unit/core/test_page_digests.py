"""Digests of pages: those of the xxHash library, and a table that tells which pages changed."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from pyqmigrate.io.process_memory import ProcessSource
from tests.harness.examples import few, some
from tests.harness.kernel import (
    CHUNK,
    PAGE_SIZES,
    Bits,
    Bytes,
    Memory,
    guest,
    memfd,
    new_block,
    new_channel,
    new_job,
    to_bits,
    to_words,
    totals,
)
from tests.harness.processes import PAGE, Holder
from tests.harness.strategies import page_bits

SIZE = lib.QM_DIGEST
KINDS = ["plain", "mapped", "file", "fill"]


def table_twin(content: Bytes, page_size: int) -> list[bytes]:
    """The digests of the pages, by the library."""
    pages = content.tobytes()
    return [
        xxhash.xxh3_128_digest(pages[at : at + page_size]) for at in range(0, len(pages), page_size)
    ]


class Table:
    def __init__(self, npages: int, fill: bytes = b"\xa5") -> None:
        self.bytes = bytearray(fill * (npages * SIZE))
        self.core = ffi.from_buffer("unsigned char[]", self.bytes)

    def entries(self) -> list[bytes]:
        return [bytes(self.bytes[at : at + SIZE]) for at in range(0, len(self.bytes), SIZE)]


@contextmanager
def memory_of(content: Bytes, kind: str, shift: int = 0) -> Iterator[Memory]:
    """The content as each kind of memory that the core knows; ``shift`` is where it starts."""
    if kind == "plain":
        yield Memory(base=content)
        return
    if kind == "fill":

        @ffi.callback("qm_fill_fn")  # type: ignore[untyped-decorator]
        def fill(_: Any, buffer: Any, offset: int, length: int) -> int:
            ffi.memmove(buffer, content[offset : offset + length].tobytes(), length)
            return length

        yield Memory(fill=fill)
        return
    with memfd(shift + len(content), fcntl.F_SEAL_SHRINK) as fd:
        for at in np.flatnonzero(content.reshape(-1, 1024).any(axis=1)) * 1024:
            os.pwrite(fd, content[at : at + 1024].tobytes(), shift + int(at))
        if kind == "file":
            yield Memory(fd=fd, fd_offset=shift)
            return
        mapping = mmap.mmap(fd, shift + len(content), prot=mmap.PROT_READ)
        yield Memory(base=np.frombuffer(mapping, dtype=np.uint8)[shift:], fd=fd, fd_offset=shift)


def digest(
    memory: Memory,
    page_size: int,
    npages: int,
    table: Table,
    *,
    selection: Any = ffi.NULL,
    job: Any = None,
    fault: Any = None,
    step: int = 1,
) -> int:
    """qm_digest_pages over a block, ``step`` chunks a call."""
    job, channel = job or new_job(), new_channel()
    fault = fault or ffi.new("struct qm_fault *")
    block = new_block(npages * page_size, page_size, 0)
    pages = step * CHUNK // page_size
    for first in range(0, npages, pages):
        count = min(pages, npages - first)
        rc: int = lib.qm_digest_pages(
            job, channel, block, memory.core, selection, table.core, first, count, fault
        )
        if rc:
            return rc
    return 0


def compare(
    memory: Memory,
    page_size: int,
    npages: int,
    table: Table,
    changed: Any,
    *,
    selection: Any = ffi.NULL,
    update: bool = True,
) -> int:
    block = new_block(npages * page_size, page_size, 0)
    return int(
        lib.qm_compare_pages(
            new_job(),
            new_channel(),
            block,
            memory.core,
            selection,
            table.core,
            update,
            changed,
            0,
            npages,
            ffi.new("struct qm_fault *"),
        )
    )


@settings(some, max_examples=300)
@given(st.integers(241, 9000), st.integers(0, 63), st.integers(0, 999))
def test_digests_are_those_of_the_library(length: int, shift: int, seed: int) -> None:
    data = np.random.default_rng(seed).bytes(length + shift)
    digest = ffi.new("unsigned char[]", SIZE)
    view = ffi.from_buffer(data) + shift
    for portable in (False, True):
        assert lib.qm_xxh3_128(view, length, portable, digest) == 0
        assert bytes(digest) == xxhash.xxh3_128_digest(data[shift:])


def test_short_inputs_have_another_algorithm_and_are_refused() -> None:
    digest = ffi.new("unsigned char[]", SIZE)
    assert lib.qm_xxh3_128(bytes(240), 240, 0, digest) == -errno.EINVAL


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_every_page_size_has_the_digests_of_the_library(page_size: int) -> None:
    content = np.frombuffer(np.random.default_rng(page_size).bytes(5 * page_size), dtype=np.uint8)
    table = Table(5)
    assert lib.qm_digest_bytes(ffi.from_buffer(content), 5, page_size, table.core) == 0
    assert table.entries() == table_twin(content, page_size)


def test_a_page_size_that_is_none_is_refused() -> None:
    for page_size in (0, 512, 4095, 131072):
        assert lib.qm_digest_bytes(bytes(4096), 1, page_size, Table(1).core) == -errno.EINVAL
        memory = Memory(base=np.zeros(4096, dtype=np.uint8))
        block, fault = new_block(4096, page_size, 0), ffi.new("struct qm_fault *")
        rc = lib.qm_digest_pages(
            new_job(), new_channel(), block, memory.core, ffi.NULL, Table(4).core, 0, 1, fault
        )
        assert rc == -errno.EINVAL


@pytest.mark.parametrize(("first", "npages"), [(1, 1), (0, 65), (128, 1), (64, 1), (1 << 63, 1)])
def test_pages_outside_of_the_block_are_refused(first: int, npages: int) -> None:
    memory = Memory(base=np.zeros(64 * 4096, dtype=np.uint8))
    block, fault = new_block(64 * 4096, 4096, 0), ffi.new("struct qm_fault *")
    rc = lib.qm_digest_pages(
        new_job(), new_channel(), block, memory.core, ffi.NULL, Table(64).core, first, npages, fault
    )
    assert rc == -errno.EINVAL


@few
@given(
    st.data(),
    st.sampled_from(PAGE_SIZES),
    st.sampled_from(KINDS),
    st.sampled_from([0, 0, 1024, 4096]),
    st.booleans(),
)
def test_the_table_is_that_of_its_twin(
    data: st.DataObject, page_size: int, kind: str, shift: int, selected: bool
) -> None:
    npages = data.draw(st.integers(1, 2 * CHUNK // page_size + 70))
    content = guest(data.draw(page_bits(npages)), page_size, npages)
    chosen = data.draw(page_bits(npages)) if selected else np.ones(npages, dtype=bool)
    table, job = Table(npages), new_job()
    selection = to_words(chosen) if selected else ffi.NULL
    with memory_of(content, kind, shift) as memory:
        assert digest(memory, page_size, npages, table, selection=selection, job=job) == 0
    untouched = b"\xa5" * SIZE
    twin = table_twin(content, page_size)
    assert table.entries() == [
        entry if wanted else untouched for entry, wanted in zip(twin, chosen, strict=True)
    ]
    pages = content.reshape(npages, page_size)[chosen]
    assert totals(job).data_pages == pages.any(axis=1).sum()
    assert totals(job).zero_pages == len(pages) - pages.any(axis=1).sum()
    assert totals(job).bytes_done == pages.size


@few
@given(st.data(), st.sampled_from(PAGE_SIZES), st.sampled_from(KINDS), st.booleans(), st.booleans())
def test_exactly_the_pages_that_differ_are_found(
    data: st.DataObject, page_size: int, kind: str, update: bool, selected: bool
) -> None:
    npages = data.draw(st.integers(1, CHUNK // page_size + 70))
    before = guest(data.draw(page_bits(npages)), page_size, 1)
    differs: Bits = data.draw(page_bits(npages))
    chosen = data.draw(page_bits(npages)) if selected else np.ones(npages, dtype=bool)
    after = before.copy()
    after.reshape(npages, page_size)[differs, data.draw(st.integers(0, page_size - 1))] ^= 0x5A
    already: Bits = data.draw(page_bits(npages))
    table, changed = Table(npages), to_words(already)
    with memory_of(before, kind) as memory:
        assert digest(memory, page_size, npages, table) == 0
    with memory_of(after, kind) as memory:
        selection = to_words(chosen) if selected else ffi.NULL
        options = {"selection": selection, "update": update}
        assert compare(memory, page_size, npages, table, changed, **options) == 0
    found = differs & chosen
    assert np.array_equal(to_bits(changed, npages), already | found)
    old, new = table_twin(before, page_size), table_twin(after, page_size)
    entered = found if update else np.zeros(npages, dtype=bool)
    assert table.entries() == [
        n if took else o for o, n, took in zip(old, new, entered, strict=True)
    ]


def test_two_pages_that_change_places_are_found() -> None:
    content = guest(np.ones(2, dtype=bool), 4096, 3).copy()
    table, changed = Table(2), to_words(np.zeros(2, dtype=bool))
    assert digest(Memory(base=content), 4096, 2, table) == 0
    swapped = content.reshape(2, 4096)[::-1].reshape(-1).copy()
    assert compare(Memory(base=swapped), 4096, 2, table, changed) == 0
    assert to_bits(changed, 2).all()


def test_mapped_holes_do_not_become_resident() -> None:
    npages = 3 * CHUNK // PAGE
    with memfd(npages * PAGE, fcntl.F_SEAL_SHRINK) as fd:
        os.pwrite(fd, b"guest", 700 * PAGE)
        allocated = os.fstat(fd).st_blocks
        mapping = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        memory = Memory(base=np.frombuffer(mapping, dtype=np.uint8), fd=fd)
        table, changed = Table(npages), to_words(np.zeros(npages, dtype=bool))
        assert digest(memory, PAGE, npages, table) == 0
        assert compare(memory, PAGE, npages, table, changed) == 0
        assert os.fstat(fd).st_blocks == allocated
        os.pwrite(fd, b"more", 1100 * PAGE)
        assert compare(memory, PAGE, npages, table, changed) == 0
        assert np.flatnonzero(to_bits(changed, npages)).tolist() == [1100]
        assert os.fstat(fd).st_blocks == allocated + PAGE // 512
        assert digest(memory, PAGE, npages, table) == 0
    zero = xxhash.xxh3_128_digest(bytes(PAGE))
    assert [k for k, entry in enumerate(table.entries()) if entry != zero] == [700, 1100]


def test_another_process_is_digested_and_what_it_never_touched_stays_so() -> None:
    npages, touched = 2 * CHUNK // PAGE, [0, 5, 511, 512, 1300]
    with Holder(npages, touched, flags=mmap.MAP_PRIVATE) as holder:
        source = ProcessSource(holder.memory)
        memory = Memory()
        memory.core.fill = ffi.addressof(lib, "qm_process_fill")
        memory.core.next = ffi.addressof(lib, "qm_process_next")
        memory.core.fill_arg = source.core
        table = Table(npages)
        assert digest(memory, PAGE, npages, table) == 0
        assert table.entries() == table_twin(holder.content, PAGE)
        assert holder.present().sum() <= 64 * (
            len(touched) + 2
        )  # a step for each, and for the ends
        source.close()


def test_memory_that_went_away_is_a_fault_that_says_where() -> None:
    with Holder(64, range(64), flags=mmap.MAP_SHARED, unmapped=40 * PAGE) as holder:
        source = ProcessSource(holder.memory)
        memory, fault = Memory(), ffi.new("struct qm_fault *")
        memory.core.fill = ffi.addressof(lib, "qm_process_fill")
        memory.core.fill_arg = source.core
        assert digest(memory, PAGE, 64, Table(64), fault=fault) == -errno.EFAULT
        assert (fault.in_memory, fault.at) == (1, 40 * PAGE)
        holder.end()
        assert digest(memory, PAGE, 64, Table(64), fault=fault) == -errno.ESRCH
        source.close()


@pytest.mark.parametrize("kind", ["mapped", "file"])
def test_a_file_that_shrank_is_a_fault(kind: str) -> None:
    with memfd(64 * PAGE) as fd:
        os.pwrite(fd, bytes([1]) * (64 * PAGE), 0)
        mapping = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        base = np.frombuffer(mapping, dtype=np.uint8) if kind == "mapped" else None
        memory, fault = Memory(base=base, fd=fd), ffi.new("struct qm_fault *")
        os.ftruncate(fd, 10 * PAGE)
        assert digest(memory, PAGE, 64, Table(64), fault=fault) == -errno.EFAULT
        assert fault.in_memory == 1


def test_a_cancelled_job_ends_before_the_next_chunk() -> None:
    job, asked = new_job(), []

    @ffi.callback("qm_fill_fn")  # type: ignore[untyped-decorator]
    def fill(_: Any, buffer: Any, offset: int, length: int) -> int:
        asked.append(offset + length)
        lib.qm_job_cancel(job)
        return length

    npages = 4 * CHUNK // PAGE
    memory = Memory(fill=fill)
    rc = digest(memory, PAGE, npages, Table(npages), job=job, step=4)
    assert rc == -errno.ECANCELED
    assert max(asked) <= CHUNK
