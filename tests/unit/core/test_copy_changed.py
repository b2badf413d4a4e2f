"""Digests of pages as they are written, and copies of the pages that differ from their digests."""

from __future__ import annotations

import errno
import fcntl
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from tests.harness.examples import few
from tests.harness.kernel import (
    CHUNK,
    PAGE_SIZES,
    Bytes,
    Memory,
    Transfer,
    fill_from,
    guest,
    memfd,
    new_block,
    new_channel,
    new_job,
    store,
    to_bits,
    to_words,
)
from tests.harness.strategies import page_bits

SIZE = lib.QM_DIGEST
PLENTY = 1 << 60


def digests_of(content: Bytes, page_size: int) -> bytes:
    pages = content.tobytes()
    return b"".join(
        xxhash.xxh3_128_digest(pages[at : at + page_size]) for at in range(0, len(pages), page_size)
    )


@contextmanager
def memory_of(content: Bytes, kind: str) -> Iterator[Memory]:
    if kind == "plain":
        yield Memory(base=content)
    elif kind == "fill":
        yield Memory(fill=fill_from(content))
    else:
        with memfd(len(content), fcntl.F_SEAL_SHRINK) as fd:
            store(fd, content)
            mapping = mmap.mmap(fd, len(content), prot=mmap.PROT_READ)
            base = np.frombuffer(mapping, dtype=np.uint8) if kind == "mapped" else None
            yield Memory(base=base, fd=fd)


class Copies:
    """A ``struct qm_copies`` and what it points to."""

    def __init__(self, table: bytes, length: int, npages: int, room: int) -> None:
        self.table, self.bytes = bytearray(table), bytearray(b"\xee" * length)
        self.copied, self.room = to_words(np.zeros(npages, dtype=bool)), ffi.new("int64_t *", room)
        self.core = ffi.new("struct qm_copies *")
        self.core.table, self.core.base = ffi.from_buffer(self.table), ffi.from_buffer(self.bytes)
        self.core.copied, self.core.room = self.copied, self.room


def copy(memory: Memory, page_size: int, npages: int, copies: Copies, selection: Any) -> int:
    transfer = Transfer(
        new_job(),
        new_block(npages * page_size, page_size, 0),
        memory=memory.core,
        selection=selection,
    )
    channel, fault = new_channel(), ffi.new("struct qm_fault *")
    pages = CHUNK // page_size
    for first in range(0, npages, pages):
        count = min(pages, npages - first)
        rc: int = lib.qm_copy_changed(transfer.core, channel, copies.core, first, count, fault)
        if rc:
            return rc
    return 0


@few
@given(
    st.data(),
    st.sampled_from(PAGE_SIZES),
    st.sampled_from(["plain", "mapped", "file", "fill"]),
    st.booleans(),
)
def test_pages_that_differ_are_copied_with_their_digests(
    data: st.DataObject, page_size: int, kind: str, selected: bool
) -> None:
    npages = data.draw(st.integers(1, CHUNK // page_size + 70))
    before = guest(data.draw(page_bits(npages)), page_size, seed=1)
    now = guest(data.draw(page_bits(npages)), page_size, seed=data.draw(st.sampled_from([1, 2])))
    chosen = data.draw(page_bits(npages)) if selected else np.ones(npages, dtype=bool)
    selection = to_words(chosen) if selected else ffi.NULL
    table = digests_of(before, page_size)
    copies = Copies(table, len(now), npages, PLENTY)
    with memory_of(now, kind) as memory:
        assert copy(memory, page_size, npages, copies, selection) == 0
    changed = (before.reshape(npages, -1) != now.reshape(npages, -1)).any(axis=1) & chosen
    assert (to_bits(copies.copied, npages) == changed).all()
    assert copies.room[0] == PLENTY - int(changed.sum()) * page_size
    new = digests_of(now, page_size)
    for page in range(npages):
        place = slice(page * page_size, (page + 1) * page_size)
        entry = slice(page * SIZE, (page + 1) * SIZE)
        expected = now[place].tobytes() if changed[page] else b"\xee" * page_size
        assert copies.bytes[place] == expected
        assert copies.table[entry] == (new if changed[page] else table)[entry]


def test_pages_without_room_are_left_alone() -> None:
    now = guest(np.ones(9, dtype=bool), 4096)
    copies = Copies(bytes(9 * SIZE), len(now), 9, 4 * 4096 + 4095)
    with memory_of(now, "plain") as memory:
        assert copy(memory, 4096, 9, copies, ffi.NULL) == 0
    assert to_bits(copies.copied, 9).tolist() == [True] * 4 + [False] * 5
    assert copies.room[0] < 0
    assert copies.table == digests_of(now, 4096)[: 4 * SIZE] + bytes(5 * SIZE)


class Written:
    """Two blocks' tables, as ``qm_digest_written`` enters digests into them."""

    def __init__(self, next: Any = ffi.NULL) -> None:
        self.tables = [bytearray(b"\x55" * (4 * SIZE)) for _ in range(2)]
        self._blocks = ffi.new("struct qm_digested_block[]", 2)
        for number, table in enumerate(self.tables):
            block = self._blocks[number]
            block.pages_offset, block.len = 1 << (20 + number), 4 * 4096
            block.page_size, block.table = 4096, ffi.from_buffer(table)
        self.core = ffi.new("struct qm_written_digests *")
        self.core.blocks, self.core.nblocks, self.core.next = self._blocks, 2, next

    def __call__(self, at: int, data: bytes | None, length: int) -> int:
        return int(lib.qm_digest_written(self.core, at, ffi.NULL if data is None else data, length))


def test_pages_are_found_by_their_position_in_the_file() -> None:
    written = Written()
    pages = guest(np.ones(2, dtype=bool), 4096)
    assert written((2 << 20) + 4096, pages.tobytes(), 8192) == 0
    old = b"\x55" * SIZE
    assert written.tables[0] == old * 4
    assert written.tables[1] == old + digests_of(pages, 4096) + old


def test_pages_whose_bytes_are_unknown_have_no_digest() -> None:
    written = Written()
    assert written((1 << 20) + 4096, None, 4096) == 0
    assert written.tables[0] == b"\x55" * SIZE + bytes(SIZE) + b"\x55" * (2 * SIZE)


@pytest.mark.parametrize(
    ("at", "length"), [(1 << 20, 4095), ((1 << 20) + 1, 4096), (1 << 20, 20480)]
)
def test_what_is_not_whole_pages_of_a_block_is_refused(at: int, length: int) -> None:
    assert Written()(at, bytes(length), length) == -errno.EINVAL


def test_the_other_hook_is_called_too() -> None:
    calls = []

    @ffi.callback("int(void *, int64_t, const void *, size_t)")
    def hook(_: Any, at: int, data: Any, length: int) -> int:
        calls.append((at, bytes(ffi.buffer(data, length))))
        return -errno.ENOSPC

    assert Written(hook)(0, b"head", 4) == -errno.ENOSPC
    assert Written(hook)(1 << 20, bytes(4096), 4096) == -errno.ENOSPC
    assert calls == [(0, b"head"), (1 << 20, bytes(4096))]


def test_zeros_are_entered_for_every_page_size() -> None:
    for page_size in PAGE_SIZES:
        table = bytearray(3 * SIZE)
        assert lib.qm_digest_zeros(3, page_size, ffi.from_buffer(table)) == 0
        assert table == digests_of(np.zeros(3 * page_size, dtype=np.uint8), page_size)
    assert lib.qm_digest_zeros(3, 5000, ffi.from_buffer(bytearray(48))) == -errno.EINVAL
