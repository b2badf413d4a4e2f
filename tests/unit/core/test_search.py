"""Memory looked through while it is read: what is found is what a plain search finds."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from tests.harness.examples import some

NOWHERE = (1 << 64) - 1
STEP = 4096


class Watched:
    """``memory`` behind a watch for ``head`` under ``mask``."""

    def __init__(self, memory: bytes, head: bytes, mask: bytes, page: int = 1024) -> None:
        self.bits = ffi.new("uint64_t[]", [(1 << 64) - 1] * (len(memory) // page // 64 + 1))
        self.fd = _memfd(memory)
        self.mapped = ffi.new("struct qm_mapped *")
        self.mapped.data, self.mapped.npages = self.bits, len(memory) // page
        self.mapped.page_size, self.mapped.fd = page, self.fd
        self.head, self.mask = ffi.new("unsigned char[]", head), ffi.new("unsigned char[]", mask)
        self.watch = ffi.new("struct qm_search *")
        self.watch.fill = ffi.addressof(lib, "qm_mapped_fill")
        self.watch.next = ffi.addressof(lib, "qm_mapped_next")
        self.watch.arg, self.watch.head, self.watch.mask = self.mapped, self.head, self.mask
        self.watch.len, self.watch.step, self.watch.found = len(head), STEP, NOWHERE

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def read(self, at: int, length: int) -> Any:
        out = ffi.new("unsigned char[]", length)
        rc = lib.qm_search_fill(self.watch, out, at, length)
        return rc if rc < 0 else bytes(ffi.buffer(out, rc))


def _memfd(data: bytes) -> int:
    fd = os.memfd_create("memory")
    os.write(fd, data)
    return fd


def plain_search(memory: bytes, head: bytes, mask: bytes, reads: list[tuple[int, int]]) -> int:
    """The twin: the lowest place that one of the reads covers whole."""
    found = [
        at
        for start, length in reads
        for at in range(-(-start // STEP) * STEP, start + length - len(head) + 1, STEP)
        if bytes(b & m for b, m in zip(memory[at:], mask, strict=False))[: len(head)] == head
    ]
    return min(found, default=NOWHERE)


@some
@given(st.data())
def test_lowest_place_is_that_of_the_twin(data: st.DataObject) -> None:
    head = data.draw(st.binary(min_size=1, max_size=34))
    mask = data.draw(st.binary(min_size=len(head), max_size=len(head)))
    head = bytes(b & m for b, m in zip(head, mask, strict=True))
    memory = np.random.default_rng(1).integers(0, 256, 32 * 1024, dtype=np.uint8)
    for at in data.draw(st.lists(st.integers(0, 31), max_size=4)):
        place = memory[at * 1024 : at * 1024 + len(head)]
        place &= ~np.frombuffer(mask, np.uint8)
        place |= np.frombuffer(head, np.uint8)
    content = memory.tobytes()
    reads = data.draw(
        st.lists(
            st.tuples(st.integers(0, 31), st.integers(1, 32)).map(
                lambda read: (read[0] * 1024, min(read[1], 32 - read[0]) * 1024)
            ),
            max_size=6,
        )
    )
    with Watched(content, head, mask) as watched:
        for at, length in reads:
            assert watched.read(at, length) == content[at : at + length]
        assert watched.watch.found == plain_search(content, head, mask, reads)
        assert lib.qm_search_next(watched.watch, 1024, 9 * 1024) == 1024


def test_memory_that_cannot_be_read_is_not_looked_at() -> None:
    with Watched(bytes(8192), b"\0", b"\0") as watched:
        watched.mapped.fd = -1
        assert watched.read(0, 4096) < 0
        assert watched.watch.found == NOWHERE
