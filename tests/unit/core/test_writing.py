"""What the core tells of what it writes: the very bytes that get into the file."""

from __future__ import annotations

import errno
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from tests.harness import core_twin as twin
from tests.harness.examples import some
from tests.harness.kernel import (
    CHUNK,
    PAGE_SIZES,
    POLICIES,
    Bits,
    Bytes,
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

PIECE = lib.QM_PIECE
PAGES_OFFSET = 3 * PIECE


class Listener:
    """Keeps what it is told, by position: bytes or None of every piece, and of the single pages at the
    end of a block. ``answer``: its result."""

    def __init__(self, answer: int = 0) -> None:
        self.told: dict[int, bytes | None] = {}
        self.pages: dict[int, bytes | None] = {}

        @ffi.callback("int(void *, int64_t, const void *, size_t)")
        def writing(argument: Any, at: int, data: Any, length: int) -> int:
            assert argument == self.argument
            content = None if data == ffi.NULL else bytes(ffi.buffer(data, length))
            if at % PIECE:
                assert at not in self.pages, "a page was told of twice"
                self.pages[at] = content
                return answer
            for start in range(0, length, PIECE):
                assert at + start not in self.told, "a piece was told of twice"
                self.told[at + start] = None if content is None else content[start : start + PIECE]
            return answer

        self.argument = ffi.new("int *")
        self.callback = writing

    def watch(self, core: Any) -> Any:
        core.hook, core.hook_arg = self.callback, self.argument
        return core


def saved(
    file: File,
    memory: Memory,
    npages: int,
    page_size: int,
    policy: str,
    *,
    direct: bool,
    listener: Listener,
    selection: Any = ffi.NULL,
) -> tuple[int, Bits]:
    """Into a file of holes; the result and the bitmap."""
    length = npages * page_size
    file.holes(PAGES_OFFSET + length)
    words = to_words(np.zeros(npages, dtype=bool))
    block = new_block(length, page_size, PAGES_OFFSET)
    core = listener.watch(file.core(direct=direct))
    rc = write(memory, block, core, POLICIES[policy], words, selection=selection, step=2)
    return rc, to_bits(words, npages)


def check_told(file: File, listener: Listener, written: Bits, page_size: int) -> None:
    """What was told is what the file has, for every whole piece with a page that was written."""
    for at, told in listener.told.items():
        assert told is not None
        if len(told) == PIECE:
            assert told == file.read(at, PIECE).tobytes(), f"piece at {at:#x}"
    for at, told in listener.pages.items():
        assert told == file.read(at, page_size).tobytes(), f"page at {at:#x}"
    pages = PIECE // page_size
    for k in range(len(written) // pages):
        assert (PAGES_OFFSET + k * PIECE in listener.told) >= written[
            k * pages : (k + 1) * pages
        ].any()


KINDS = ["plain", "unaligned", "memfd", "mapped memfd", "callback"]


@some
@given(st.data())
def test_hook_gets_what_the_file_has(file: File, data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from(PAGE_SIZES))
    policy = data.draw(st.sampled_from(sorted(POLICIES)))
    direct = data.draw(st.booleans())
    npages = data.draw(st.integers(1, (2 * CHUNK + 3 * PIECE) // page_size))
    bits = data.draw(page_bits(npages))
    kind = data.draw(st.sampled_from(KINDS))
    memory = guest(bits, page_size, seed=npages, shift=8 if kind == "unaligned" else 0)
    listener = Listener()
    with memfd(len(memory)) as fd:
        if kind in ("plain", "unaligned"):
            source = Memory(base=memory)
        elif kind == "callback":
            source = Memory(fill=fill_from(memory))
        else:
            store(fd, memory)
            base = mapped(fd, 0, len(memory)) if kind == "mapped memfd" else None
            source = Memory(base=base, fd=fd)
        rc, found = saved(file, source, npages, page_size, policy, direct=direct, listener=listener)
    assert rc == 0
    everything = np.ones(npages, dtype=bool)
    expected, written = twin.write(
        memory,
        page_size,
        POLICIES[policy],
        selection=everything,
        prior=~everything,
        direct_len=len(memory),
    )
    assert (found == expected).all()
    check_told(file, listener, written, page_size)
    back = np.full(len(memory), 0x77, dtype=np.uint8)
    block = new_block(len(memory), page_size, PAGES_OFFSET)
    assert read(Memory(base=back), block, file.core(direct=False), to_words(found)) == 0
    assert (back == memory).all()


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("direct", [True, False])
def test_hook_gets_what_the_file_has_while_memory_changes(
    file: File, policy: str, direct: bool
) -> None:
    memory = guest(np.random.default_rng(3).random(6000) < 0.5, 4096)
    stop = threading.Event()
    writer = threading.Thread(target=_scribble, args=(memory, stop))
    writer.start()
    try:
        for _ in range(5):
            listener = Listener()
            rc, bits = saved(
                file, Memory(base=memory), 6000, 4096, policy, direct=direct, listener=listener
            )
            assert rc == 0
            assert listener.told
            check_told(file, listener, bits, 4096)
            _check_clear_pages_are_zeros(file, bits)
    finally:
        stop.set()
        writer.join()


def _scribble(memory: Bytes, stop: threading.Event) -> None:
    """Lets pages come and go, and change."""
    pages = memory.reshape(-1, 4096)
    rng = np.random.default_rng(5)
    while not stop.is_set():
        chosen = rng.integers(0, len(pages), 500)
        pages[chosen] = rng.integers(0, 2, len(chosen), dtype=np.uint8)[:, None] * 0x55


def _check_clear_pages_are_zeros(file: File, bits: Bits) -> None:
    pages = file.read(PAGES_OFFSET, len(bits) * 4096).reshape(-1, 4096)
    assert not pages[~bits].any()


def test_hook_of_a_pass_over_a_selection_hears_only_that_something_changes(file: File) -> None:
    memory = guest(np.ones(2048, dtype=bool), 4096)
    selection = np.zeros(2048, dtype=bool)
    selection[[300, 301, 1900]] = True
    listener = Listener()
    rc, bits = saved(
        file,
        Memory(base=memory),
        2048,
        4096,
        "exact",
        direct=True,
        listener=listener,
        selection=to_words(selection),
    )
    assert rc == 0
    assert (bits == selection).all()
    assert listener.told == {PAGES_OFFSET + PIECE: None, PAGES_OFFSET + 7 * PIECE: None}


def test_hook_is_not_called_for_zeros(file: File) -> None:
    memory = guest(np.zeros(3000, dtype=bool), 4096)
    listener = Listener()
    rc, _ = saved(file, Memory(base=memory), 3000, 4096, "auto", direct=True, listener=listener)
    assert (rc, listener.told) == (0, {})


def test_an_error_of_the_listener_ends_the_write(file: File) -> None:
    memory = guest(np.ones(3000, dtype=bool), 4096)
    listener = Listener(-errno.EDOM)
    rc, _ = saved(file, Memory(base=memory), 3000, 4096, "auto", direct=True, listener=listener)
    assert rc == -errno.EDOM
    assert len(listener.told) == 1, "it went on"
