"""What page records do to memory, against a twin in plain Python; and untrusted records."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from tests.harness import page_records as records
from tests.harness.examples import some
from tests.harness.kernel import PAGE_SIZES, Bytes, File, Memory, memfd, new_job, totals
from tests.harness.page_records import (
    CONTINUE,
    END_MARK,
    EOS,
    NAMES,
    PAGE,
    ZERO,
    Decoder,
    Record,
    str8,
    word,
)
from tests.harness.strategies import record_lists

STALE = 0x77
KINDS = ["buffer", "mapped", "file"]


@contextmanager
def memory_of(kind: str, content: Bytes) -> Iterator[Memory]:
    """Memory that holds ``content``; ``Memory.fd`` says where it is a file."""
    if kind == "buffer":
        yield Memory(base=content)
        return
    with memfd(len(content)) as fd:
        os.pwrite(fd, content.tobytes(), 0)
        mapping = mmap.mmap(fd, len(content)) if kind == "mapped" else None
        view = None if mapping is None else np.frombuffer(mapping, dtype=np.uint8)
        memory = Memory(base=view, fd=fd)
        yield memory
        content[:] = np.frombuffer(os.pread(fd, len(content), 0), dtype=np.uint8)


@some
@given(
    page_size=st.sampled_from([1024, 4096]),
    kind=st.sampled_from(KINDS),
    fresh=st.booleans(),
    skipped=st.booleans(),
    data=st.data(),
)
def test_memory_is_that_of_the_twin(
    page_size: int, kind: str, fresh: bool, skipped: bool, data: st.DataObject
) -> None:
    npages = [9, 1, 70]
    listed = data.draw(record_lists(npages, page_size))
    stream = records.stream_of(listed, NAMES, page_size)
    before = [np.full(n * page_size, STALE, dtype=np.uint8) for n in npages]
    after, seen = records.apply(listed, before, page_size, fresh=fresh)
    contents = [memory.copy() for memory in before]
    with ExitStack() as stack:
        memories: list[Memory | None] = [
            stack.enter_context(memory_of(kind, content)) for content in contents
        ]
        if skipped:
            memories[1] = None
            after[1], seen[1] = before[1], np.zeros_like(seen[1])
        decoder = Decoder(NAMES, [len(c) for c in contents], memories, page_size, fresh=fresh)
        cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
        assert decoder.feed_sliced(stream + b"rest", cuts) == (1, len(stream))
    for n in range(3):
        assert np.array_equal(contents[n], after[n])
        assert np.array_equal(decoder.seen()[n], seen[n])
    counted = totals(decoder.job)
    real = [r for r in listed if not (skipped and r.block == 1)]
    assert counted.zero_pages == sum(r.fill == 0 for r in real)
    assert counted.data_pages == sum(r.fill != 0 for r in real)
    assert counted.bytes_done == sum(int(bits.sum()) for bits in seen) * page_size


def decoder_of(npages: int = 4, page_size: int = 4096) -> tuple[Decoder, Bytes]:
    content = np.full(npages * page_size, STALE, dtype=np.uint8)
    return Decoder([b"a"], [len(content)], [Memory(base=content)], page_size), content


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_bytes_may_come_one_by_one(page_size: int) -> None:
    decoder, content = decoder_of(2, page_size)
    page = bytes(range(256)) * (page_size // 256)
    stream = word(page_size, PAGE) + str8(b"a") + page + word(0, ZERO | CONTINUE) + b"\0" + END_MARK
    for n in range(len(stream)):
        assert decoder.feed(stream[n : n + 1]) == (int(n == len(stream) - 1), 1)
    assert content.tobytes() == bytes(page_size) + page


def test_current_block_lasts_over_the_end_of_a_section() -> None:
    decoder, content = decoder_of()
    assert decoder.feed(word(0, ZERO) + str8(b"a") + b"\0" + END_MARK)[0] == 1
    assert decoder.feed(word(4096, ZERO | CONTINUE) + b"\0" + END_MARK)[0] == 1
    assert not content[:8192].any()
    assert content[8192:].all()


def test_mapping_whose_file_shrank_is_not_touched() -> None:
    """A store through the mapping would be a SIGBUS; a write past the end makes the file longer."""
    with memfd(8192) as fd, mmap.mmap(fd, 8192) as mapping:
        view = np.frombuffer(mapping, dtype=np.uint8)
        memory = Memory(base=view, fd=fd)
        os.ftruncate(fd, 0)
        decoder = Decoder([b"a"], [8192], [memory], 4096)
        stream = (
            word(4096, PAGE)
            + str8(b"a")
            + b"\x11" * 4096
            + word(0, ZERO | CONTINUE)
            + b"\0"
            + word(4096, records.XBZRLE | CONTINUE)
            + b"\x01\x00\x00"
            + END_MARK
        )
        assert decoder.feed(stream)[0] == 1
        assert os.pread(fd, 4096, 4096) == b"\x11" * 4096
        del decoder, memory, view


def test_change_to_a_page_that_is_gone_is_a_memory_fault() -> None:
    with memfd(8192) as fd:
        decoder = Decoder([b"x", b"a"], [4096, 8192], [None, Memory(fd=fd)], 4096, fresh=False)
        os.ftruncate(fd, 4096)
        rc, _ = decoder.feed(word(4096, records.XBZRLE) + str8(b"a") + b"\x01\x00\x00" + END_MARK)
        assert rc == -errno.EFAULT
        assert (decoder.fault.in_memory, decoder.fault.block, decoder.fault.at) == (1, 1, 4096)


def test_write_that_a_seal_refuses_is_a_memory_fault() -> None:
    with memfd(8192, fcntl.F_SEAL_WRITE) as fd:
        decoder = Decoder([b"a"], [8192], [Memory(fd=fd)], 4096)
        rc, _ = decoder.feed(word(4096, PAGE) + str8(b"a") + bytes(range(256)) * 16 + END_MARK)
        assert rc == -errno.EPERM
        assert (decoder.fault.in_memory, decoder.fault.block, decoder.fault.at) == (1, 0, 4096)


REFUSED = {
    "full": (word(0, 0x01), lib.QM_RECORD_FLAGS),
    "block list": (word(4096, 0x04), lib.QM_RECORD_FLAGS),
    "hook": (word(0, 0x80), lib.QM_RECORD_FLAGS),
    "compressed": (word(0, 0x100), lib.QM_RECORD_COMPRESSED),
    "nothing": (word(0, 0), lib.QM_RECORD_FLAGS),
    "two kinds": (word(0, ZERO | PAGE), lib.QM_RECORD_FLAGS),
    "unknown flag": (word(0, PAGE | 0x400), lib.QM_RECORD_FLAGS),
    "end mark with an offset": (word(4096, EOS), lib.QM_RECORD_FLAGS),
    "end mark that continues": (word(0, EOS | CONTINUE), lib.QM_RECORD_FLAGS),
    "flush mark of multifd": (word(0, records.FLUSH), lib.QM_RECORD_MULTIFD),
    "flush with a page": (word(0, PAGE | records.FLUSH), lib.QM_RECORD_FLAGS),
    "continues nothing": (word(0, PAGE | CONTINUE), lib.QM_RECORD_NO_BLOCK),
    "unknown block": (word(0, ZERO) + str8(b"A"), lib.QM_RECORD_UNKNOWN),
    "longer name": (word(0, ZERO) + str8(b"ab"), lib.QM_RECORD_UNKNOWN),
    "name of no bytes": (word(0, ZERO) + str8(b""), lib.QM_RECORD_UNKNOWN),
    "just outside": (word(4 * 4096, ZERO) + str8(b"a"), lib.QM_RECORD_OUTSIDE),
    "far outside": (word(-4096 & (1 << 64) - 1, PAGE) + str8(b"a"), lib.QM_RECORD_OUTSIDE),
    "delta of another encoding": (
        word(0, records.XBZRLE) + str8(b"a") + b"\x02\x00\x00",
        lib.QM_RECORD_DELTA,
    ),
    "delta longer than a page": (
        word(0, records.XBZRLE) + str8(b"a") + b"\x01\x10\x01",
        lib.QM_RECORD_DELTA,
    ),
    "delta cut off": (
        word(0, records.XBZRLE) + str8(b"a") + b"\x01\x00\x02\x00\x05",
        lib.QM_RECORD_DELTA,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_record_is_refused_with_its_place(what: str) -> None:
    decoder, content = decoder_of()
    data, reason = REFUSED[what]
    before = word(4096, PAGE) + str8(b"a") + b"\x01" * 4096 + END_MARK
    if reason == lib.QM_RECORD_NO_BLOCK:
        before = END_MARK
    assert decoder.feed(before)[0] == 1
    assert decoder.feed(data)[0] == -errno.EBADMSG
    error = decoder.error()
    assert error.what == reason
    assert error.at == len(before)
    assert error.word == int.from_bytes(data[:8], "big")
    assert (content[:4096] == STALE).all() and (content[8192:] == STALE).all()


def apply_delta(delta: bytes, page: bytes) -> bytes | int:
    exact = ffi.new("unsigned char[]", delta) if delta else ffi.new("unsigned char[1]")
    out = ffi.new("unsigned char[]", page)
    rc = int(lib.qm_apply_delta(exact, len(delta), out, len(page)))
    return rc or bytes(ffi.buffer(out, len(page)))


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        (b"", b"........"),
        (b"\x00\x02ab", b"ab......"),
        (b"\x03\x01x", b"...x...."),
        (b"\x01\x01a\x02\x03bcd", b".a..bcd."),
        (b"\x00\x08abcdefgh", b"abcdefgh"),
        (b"\x80\x00\x01a", b"a......."),
    ],
)
def test_delta_skips_and_replaces(delta: bytes, expected: bytes) -> None:
    assert apply_delta(delta, b"." * 8) == expected


def test_delta_lengths_of_two_bytes_are_little_endian() -> None:
    page = bytes(4096)
    assert apply_delta(b"\xac\x02" + b"\xc8\x01" + b"n" * 200, page) == (
        bytes(300) + b"n" * 200 + bytes(4096 - 500)
    )


@pytest.mark.parametrize(
    "delta",
    [
        b"\x01",
        b"\x00\x00",
        b"\x00\x01",
        b"\x08\x01a",
        b"\x09",
        b"\x00\x09abcdefghi",
        b"\x80",
        b"\x80\x80\x01a",
        b"\x00\x01a\x00\x01b",
        b"\x00\x02a",
        b"\x00\x80",
    ],
)
def test_malformed_delta_is_refused(delta: bytes) -> None:
    assert apply_delta(delta, b"." * 8) == -errno.EBADMSG


@some
@given(delta=st.binary(max_size=60), size=st.sampled_from([8, 64, 1024]))
def test_any_delta_is_as_in_the_twin(delta: bytes, size: int) -> None:
    assert apply_delta(delta, b"." * size) == (twin_delta(delta, b"." * size) or -errno.EBADMSG)


def twin_delta(delta: bytes, page: bytes) -> bytes | None:
    out, at, done = bytearray(page), 0, 0

    def take() -> int:
        nonlocal at
        low = delta[at]
        at += 1
        if low < 0x80:
            return low
        high = delta[at]
        at += 1
        if high >= 0x80:
            raise IndexError
        return low & 0x7F | high << 7

    try:
        while at < len(delta):
            same = take()
            if (same == 0 and done) or done + same > len(page):
                return None
            done += same
            changed = take()
            new = delta[at : at + changed]
            if changed == 0 or len(new) < changed or done + changed > len(page):
                return None
            out[done : done + changed] = new
            at, done = at + changed, done + changed
    except IndexError:
        return None
    return bytes(out)


@some
@given(data=st.data())
def test_hostile_bytes_never_reach_outside(data: st.DataObject) -> None:
    """Mutated records end, fail or go on; guards beside the memory are untouched."""
    page = 1024
    listed = data.draw(record_lists([3, 2], page))
    stream = bytearray(records.stream_of(listed, NAMES[:2], page))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(stream) - 1))
        stream[at] = data.draw(st.sampled_from([0, 1, 2, 8, 0x10, 0x28, 0x40, 0x7F, 0x80, 0xFF]))
    guarded = [np.full(n * page + 2048, STALE, dtype=np.uint8) for n in (3, 2)]
    inner = [Memory(base=g[1024:-1024]) for g in guarded]
    decoder = Decoder(NAMES[:2], [3 * page, 2 * page], inner, page)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=5))
    rc, taken = decoder.feed_sliced(bytes(stream), cuts)
    assert rc in (0, 1, -errno.EBADMSG)
    assert taken <= len(stream)
    for g in guarded:
        assert (g[:1024] == STALE).all() and (g[-1024:] == STALE).all()


@some
@given(npages=st.integers(1, 900), at=st.integers(0, 5000))
def test_file_is_decoded_section_by_section(file: File, npages: int, at: int) -> None:
    rng = np.random.default_rng(npages)
    content = np.full(npages * 4096, STALE, dtype=np.uint8)
    pages = [rng.bytes(4096) for _ in range(npages)]
    one = records.stream_of([Record(0, k, page=p) for k, p in enumerate(pages)], [b"a"], 4096)
    two = records.stream_of([Record(0, 0, fill=0)], [b"a"], 4096)
    file.fill(bytes(at) + one + b"BETWEEN" + two)
    decoder = Decoder([b"a"], [len(content)], [Memory(base=content)], 4096)
    position, end = ffi.new("int64_t *", at), at + len(one) + 7 + len(two)
    arguments = (decoder.job, decoder.core, file.fd, position, end, decoder.fault)
    assert lib.qm_decode_file(*arguments) == 1
    assert position[0] == at + len(one)
    assert content.tobytes() == b"".join(pages)
    position[0] += 7
    assert lib.qm_decode_file(*arguments) == 1
    assert position[0] == end
    assert content.tobytes() == b"".join([bytes(4096), *pages[1:]])


@pytest.mark.parametrize("where", ["file", "end"])
def test_section_that_is_cut_off_has_no_data(file: File, where: str) -> None:
    content = np.zeros(4096, dtype=np.uint8)
    stream = records.stream_of([Record(0, 0, page=b"x" * 4096)], [b"a"], 4096)
    file.fill(stream[:-1] if where == "file" else stream)
    decoder = Decoder([b"a"], [4096], [Memory(base=content)], 4096)
    position = ffi.new("int64_t *", 0)
    end = len(stream) + 100 if where == "file" else len(stream) - 1
    rc = lib.qm_decode_file(decoder.job, decoder.core, file.fd, position, end, decoder.fault)
    assert rc == -errno.ENODATA
    assert decoder.fault.at == len(stream) - 1


def test_cancelled_job_reads_no_more(file: File) -> None:
    content = np.full(4096, STALE, dtype=np.uint8)
    file.fill(records.stream_of([Record(0, 0, fill=0)], [b"a"], 4096))
    decoder = Decoder([b"a"], [4096], [Memory(base=content)], 4096)
    decoder.job = new_job()
    lib.qm_job_cancel(decoder.job)
    position = ffi.new("int64_t *", 0)
    rc = lib.qm_decode_file(decoder.job, decoder.core, file.fd, position, 100, decoder.fault)
    assert rc == -errno.ECANCELED
    assert (content == STALE).all()


def test_page_size_that_is_none_makes_no_decoder() -> None:
    for page_size in (0, 512, 3000, 131072):
        assert lib.qm_decoder_create(ffi.NULL, 0, page_size, 1) == ffi.NULL
