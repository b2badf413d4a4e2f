"""The page records that are made of memory, against a twin in plain Python."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import socket
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from tests.harness import page_records as records
from tests.harness.examples import some
from tests.harness.kernel import (
    CHUNK,
    PAGE_SIZES,
    Bits,
    Bytes,
    File,
    Memory,
    Transfer,
    guest,
    memfd,
    new_block,
    new_channel,
    new_job,
    to_words,
    totals,
)
from tests.harness.page_records import Name
from tests.harness.strategies import page_bits

NAME = b"pc.ram"


def stream(
    file: File,
    memory: Memory,
    length: int,
    page_size: int,
    *,
    at: int = 0,
    selection: Bits | None = None,
    job: object = None,
) -> bytes:
    """What the encoder writes for one block, in calls of two chunks."""
    file.fill(b"")
    job = job or new_job()
    channel, fault, name = new_channel(), ffi.new("struct qm_fault *"), Name(NAME)
    encoder = ffi.gc(lib.qm_encoder_create(file.fd, at), lib.qm_encoder_destroy)
    words = ffi.NULL if selection is None else to_words(selection)
    npages = length // page_size
    transfer = Transfer(job, new_block(length, page_size, 0), memory=memory.core, selection=words)
    step = 2 * CHUNK // page_size
    for first in range(0, npages, step):
        rc = lib.qm_encode_pages(
            transfer.core, channel, encoder, name.core, first, min(step, npages - first), fault
        )
        assert rc == 0
    assert lib.qm_encoder_flush(job, encoder, fault) == 0
    end = lib.qm_encoder_position(encoder)
    return file.read(at, end - at).tobytes()


def expected(memory: Bytes, page_size: int, selection: Bits | None = None) -> bytes:
    want = np.ones(len(memory) // page_size, dtype=bool) if selection is None else selection
    return records.encode(memory, page_size, NAME, want, named=False)


@some
@given(
    page_size=st.sampled_from(PAGE_SIZES),
    data=st.data(),
    select=st.booleans(),
    at=st.integers(0, 5000),
    shift=st.sampled_from([0, 1, 64]),
)
def test_stream_is_that_of_the_twin(
    file: File, page_size: int, data: st.DataObject, select: bool, at: int, shift: int
) -> None:
    npages = data.draw(st.integers(1, 3 * CHUNK // max(page_size, 8192)))
    memory = guest(data.draw(page_bits(npages)), page_size, shift=shift)
    selection = data.draw(page_bits(npages)) if select else None
    got = stream(file, Memory(base=memory), len(memory), page_size, at=at, selection=selection)
    assert got == expected(memory, page_size, selection)


@some
@given(
    npages=st.integers(1, 70),
    first=st.integers(0, 1 << 40),
    named=st.booleans(),
    room=st.integers(0, 40000),
    data=st.data(),
)
def test_kernel_stops_before_a_record_that_does_not_fit(
    npages: int, first: int, named: bool, room: int, data: st.DataObject
) -> None:
    page_size = 1024
    bits, want = data.draw(page_bits(npages)), data.draw(page_bits(npages))
    memory = guest(bits, page_size)
    out = ffi.new("unsigned char[]", max(room, 1))
    name, pages = Name(NAME), ffi.from_buffer("unsigned char[]", memory)
    wanted, data_words = to_words(want), to_words(bits)
    encoding = ffi.new(
        "struct qm_encoding *",
        {
            "name": name.core,
            "named": named,
            "page_size": page_size,
            "pages": pages,
            "first": first,
            "npages": npages,
            "want": wanted,
            "data": data_words,
        },
    )
    have = lib.qm_encode(encoding, out, room)
    done = np.arange(npages) < encoding.next
    whole = records.encode(memory, page_size, NAME, want & done, named)
    # The twin counts from page 0: put the first page's offset into every word.
    got = bytes(ffi.buffer(out, have)) if have else b""
    assert len(got) == len(whole) <= room
    assert [w - first * page_size for w in words_of(got, named)] == words_of(whole, named)
    assert encoding.named == (named or have > 0)
    if encoding.next < npages:
        k = encoding.next
        front = 0 if encoding.named else 1 + len(NAME)
        assert want[k] and room - have < 8 + front + (page_size if bits[k] else 1)


def words_of(data: bytes, named: bool) -> list[int]:
    """The words of records of 1 KiB pages."""
    found, at = [], 0
    while at < len(data):
        word = int.from_bytes(data[at : at + 8], "big")
        found.append(word)
        at += 8 + (0 if word & records.CONTINUE else 1 + data[at + 8])
        at += 1024 if word & records.PAGE else 1
    return found


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_holes_of_a_file_are_zero_records_and_stay_holes(file: File, sealed: bool) -> None:
    size = 3 * CHUNK + 8192
    with memfd(size, fcntl.F_SEAL_SHRINK if sealed else 0) as fd:
        memory = np.zeros(size, dtype=np.uint8)
        for at in (4096, CHUNK + 12288, size - 4096):
            memory[at : at + 4096] = 0x5A
            os.pwrite(fd, bytes([0x5A]) * 4096, at)
        allocated = os.fstat(fd).st_blocks
        with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
            view = np.frombuffer(mapping, dtype=np.uint8)
            core = Memory(base=view if sealed else None, fd=fd)
            assert stream(file, core, size, 4096) == expected(memory, 4096)
            del core, view
            gc.collect()
        assert os.fstat(fd).st_blocks == allocated


def test_memory_that_ends_early_is_a_memory_fault(file: File) -> None:
    with memfd(CHUNK) as fd:
        fault, name = ffi.new("struct qm_fault *"), Name(NAME)
        encoder = ffi.gc(lib.qm_encoder_create(file.fd, 0), lib.qm_encoder_destroy)
        memory = Memory(fd=fd)
        transfer = Transfer(new_job(), new_block(2 * CHUNK, 4096, 0), memory=memory.core)
        rc = lib.qm_encode_pages(
            transfer.core, new_channel(), encoder, name.core, 0, 2 * CHUNK // 4096, fault
        )
        assert rc == -14
        assert fault.in_memory == 1
        assert fault.at == CHUNK


def test_counts_are_those_of_the_selected_pages(file: File) -> None:
    bits = np.arange(100) % 3 == 0
    selection = np.arange(100) < 50
    job = new_job()
    memory = guest(bits, 4096)
    got = stream(file, Memory(base=memory), len(memory), 4096, selection=selection, job=job)
    counted = totals(job)
    assert (counted.data_pages, counted.zero_pages) == (17, 33)
    assert counted.bytes_done == 50 * 4096
    assert counted.bytes_moved == len(got)


def test_writes_are_of_a_mebibyte_or_more(file: File) -> None:
    job = new_job()
    memory = guest(np.ones(8192, dtype=bool), 4096)
    got = stream(file, Memory(base=memory), len(memory), 4096, job=job)
    assert totals(job).calls <= len(got) // (1 << 20) + 1


def test_cancelled_job_writes_no_more(file: File) -> None:
    file.fill(b"")
    job, fault, name = new_job(), ffi.new("struct qm_fault *"), Name(NAME)
    lib.qm_job_cancel(job)
    encoder = ffi.gc(lib.qm_encoder_create(file.fd, 0), lib.qm_encoder_destroy)
    memory = guest(np.ones(10, dtype=bool), 4096)
    core = Memory(base=memory)
    transfer = Transfer(job, new_block(len(memory), 4096, 0), memory=core.core)
    rc = lib.qm_encode_pages(transfer.core, new_channel(), encoder, name.core, 0, 10, fault)
    assert rc == -125
    assert lib.qm_encoder_put(job, encoder, b"x", 1, fault) == 0
    assert lib.qm_encoder_flush(job, encoder, fault) == -125
    assert os.fstat(file.fd).st_size == 0


def test_block_is_named_again_when_it_was_forgotten(file: File) -> None:
    file.fill(b"")
    job, fault, name = new_job(), ffi.new("struct qm_fault *"), Name(NAME)
    encoder = ffi.gc(lib.qm_encoder_create(file.fd, 0), lib.qm_encoder_destroy)
    memory = guest(np.ones(1, dtype=bool), 1024)
    core = Memory(base=memory)
    transfer = Transfer(job, new_block(1024, 1024, 0), memory=core.core)
    for _ in range(2):
        for _ in range(2):
            rc = lib.qm_encode_pages(transfer.core, new_channel(), encoder, name.core, 0, 1, fault)
            assert rc == 0
        lib.qm_encoder_forget_block(encoder)
    lib.qm_encoder_flush(job, encoder, fault)
    one = [records.encode(memory, 1024, NAME, np.ones(1, dtype=bool), n) for n in (False, True)]
    assert file.read(0, 10000).tobytes() == (one[0] + one[1]) * 2


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_bytes_go_forward_through_what_has_no_positions(kind: str) -> None:
    """More than a pipe holds, to a descriptor that does not wait."""
    if kind == "pipe":
        reader, writer = os.pipe2(os.O_NONBLOCK)
    else:
        ours, theirs = socket.socketpair()
        reader, writer = ours.detach(), theirs.detach()
    os.set_blocking(reader, True)
    data, parts = os.urandom(3 << 20), []

    def take() -> None:
        while part := os.read(reader, 1 << 16):
            parts.append(part)

    thread = threading.Thread(target=take)
    thread.start()
    job, fault = new_job(), ffi.new("struct qm_fault *")
    encoder = ffi.gc(lib.qm_encoder_create(writer, 0), lib.qm_encoder_destroy)
    lib.qm_encoder_go_forward(encoder)
    assert lib.qm_encoder_put(job, encoder, data, len(data), fault) == 0
    assert lib.qm_encoder_flush(job, encoder, fault) == 0
    assert lib.qm_encoder_position(encoder) == totals(job).bytes_moved == len(data)
    os.close(writer)
    thread.join()
    os.close(reader)
    assert b"".join(parts) == data


def test_reader_that_is_gone_and_a_cancelled_job_end_what_goes_forward() -> None:
    for cancelled, number in ((True, errno.ECANCELED), (False, errno.EPIPE)):
        reader, writer = os.pipe2(os.O_NONBLOCK)
        job, fault = new_job(), ffi.new("struct qm_fault *")
        if cancelled:
            lib.qm_job_cancel(job)
        else:
            os.close(reader)
        encoder = ffi.gc(lib.qm_encoder_create(writer, 0), lib.qm_encoder_destroy)
        lib.qm_encoder_go_forward(encoder)
        data = bytes(1 << 20)
        rc = lib.qm_encoder_put(job, encoder, data, len(data), fault) or lib.qm_encoder_flush(
            job, encoder, fault
        )
        assert rc == -number
        os.close(writer)
        if cancelled:
            os.close(reader)
