"""Page records: encoded, decoded, and staged."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest

from pyqmigrate.core import Block, Channel, File, JobState, Policy, Transfer
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.memory import OpenMemory
from pyqmigrate.io.records import BlockName, Decoded, Decoder, Encoder, RecordFault, StagingBuffer
from tests.harness.page_records import CONTINUE, END_MARK, word
from tests.harness.page_records import PAGE as PAGE_FLAG

PAGE = 4096
LENGTH = 4 * PAGE
CONTENT = bytes([1]) * PAGE + bytes(PAGE) + bytes([2]) * PAGE + bytes(PAGE)


def encoded(fd: int, position: int = 0, name: str = "ram") -> int:
    """Write the records of CONTENT and the end mark to ``fd``; return where they end."""
    job = JobState()
    memory = OpenMemory("ram", CONTENT, writable=False)
    everything = Bitmap(4)
    everything.core[0] = 15
    transfer = Transfer(
        job, Block(LENGTH, PAGE), memory=memory, data=Bitmap(4), selection=everything
    )
    encoder = Encoder(fd, position)
    with Channel() as channel:
        assert encoder.put_pages(transfer, channel, BlockName(name), 0, 4) == 0
    assert encoder.put(job, END_MARK) == 0
    assert encoder.flush(job) == 0
    return encoder.position


def decoder_to(memory: bytearray, names: tuple[str, ...] = ("ram",)) -> tuple[Decoder, Bitmap]:
    decoder = Decoder([(name, LENGTH) for name in names], PAGE)
    seen = Bitmap(4)
    decoder.write_to_memory(len(names) - 1, OpenMemory("ram", memory, writable=True), seen)
    decoder.start()
    return decoder, seen


def test_encoded_pages_are_decoded() -> None:
    with open(os.memfd_create("stream"), "r+b") as file:
        end = encoded(file.fileno(), 100)
        memory = bytearray(b"\xff" * LENGTH)
        decoder, seen = decoder_to(memory)
        decoder.position = 100
        assert decoder.decode_file(JobState(), file.fileno(), end) == Decoded.END
    assert decoder.position == end
    assert seen.count() == 4
    assert memory == CONTENT


def test_counting_encoder_has_the_same_position() -> None:
    with open(os.memfd_create("stream"), "r+b") as file:
        assert encoded(-1, 7) == encoded(file.fileno(), 7)


@pytest.mark.parametrize("size", [1, 7, 4096, 5000])
def test_pieces_of_any_size_are_decoded(size: int) -> None:
    with open(os.memfd_create("stream"), "r+b") as file:
        data = os.pread(file.fileno(), encoded(file.fileno()), 0)
    memory = bytearray(LENGTH)
    decoder, _ = decoder_to(memory)
    results = [
        decoder.decode(JobState(), data[start : start + size])
        for start in range(0, len(data), size)
    ]
    assert results == [Decoded.ALL] * (len(results) - 1) + [Decoded.END]
    assert memory == CONTENT


@pytest.mark.parametrize("name", ["ram", "a" * 255, "\udcff-not-utf8"])
def test_names_of_many_blocks_keep_their_bytes(name: str) -> None:
    with open(os.memfd_create("stream"), "r+b") as file:
        end = encoded(file.fileno(), name=name)
        memory = bytearray(LENGTH)
        decoder, _ = decoder_to(memory, ("other", "", name))
        assert decoder.decode_file(JobState(), file.fileno(), end) == Decoded.END
    assert memory == CONTENT


def test_content_is_marked_without_memory() -> None:
    decoder = Decoder([("ram", LENGTH)], PAGE)
    content, seen = Bitmap(4), Bitmap(4)
    decoder.mark_content(0, content, seen)
    decoder.start()
    with open(os.memfd_create("stream"), "r+b") as file:
        decoder.decode_file(JobState(), file.fileno(), encoded(file.fileno()))
    assert [content[page] for page in range(4)] == [True, False, True, False]
    assert seen.count() == 4


def test_error_describes_the_record() -> None:
    decoder, _ = decoder_to(bytearray(LENGTH))
    data = word(0, PAGE_FLAG | CONTINUE) + CONTENT[:PAGE]
    assert decoder.decode(JobState(), data) == -errno.EBADMSG
    error = decoder.error()
    assert (error.fault, error.position, error.block) == (RecordFault.NO_BLOCK, 0, None)
    assert error.word == PAGE_FLAG | CONTINUE


def test_error_names_an_unlisted_block() -> None:
    with open(os.memfd_create("stream"), "r+b") as file:
        end = encoded(file.fileno(), name="other")
        decoder, _ = decoder_to(bytearray(LENGTH))
        assert decoder.decode_file(JobState(), file.fileno(), end) == -errno.EBADMSG
    assert (decoder.error().fault, decoder.error().name) == (RecordFault.UNKNOWN, b"other")


def test_staged_pages_are_written_to_their_place() -> None:
    job, data, seen = JobState(), Bitmap(4), Bitmap(4)
    decoder = Decoder([("ram", LENGTH)], PAGE)
    decoder.write_to_staging(0, seen)
    decoder.start()
    with (
        open(os.memfd_create("stream"), "r+b") as stream,
        open(os.memfd_create("file"), "r+b") as file,
        contextlib.ExitStack() as stack,
    ):
        end = encoded(stream.fileno())
        os.truncate(file.fileno(), 1 << 20)
        assert decoder.decode_file(job, stream.fileno(), end) == Decoded.UNSTAGED
        assert decoder.unstaged() == (0, 0)
        buffer = StagingBuffer(stack, PAGE)
        buffer.place(0, LENGTH, file.fileno(), 8 * PAGE, data)
        decoder.stage(0, buffer)
        assert decoder.decode_file(job, stream.fileno(), end) == Decoded.END
        block = Block(LENGTH, PAGE, 8 * PAGE)
        transfer = Transfer(job, block, file=File(file.fileno()), policy=Policy(), data=data)
        with Channel() as channel:
            assert buffer.write(transfer, channel) == 0
        assert os.pread(file.fileno(), LENGTH, 8 * PAGE) == CONTENT
    assert [data[page] for page in range(4)] == [True, False, True, False]
