"""The destination's messages: whole or in pieces the same, and nothing else is taken for one."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import QemuError, UsageError
from pyqmigrate.format.postcopy.return_path import (
    Message,
    Pong,
    Received,
    Request,
    Resumed,
    ReturnPath,
    Shut,
)
from pyqmigrate.format.postcopy.stream import PostcopyBlock
from pyqmigrate.format.stream.block_spec import BlockSpec

PAGE = 4096
END_MARK = 0x0123456789ABCDEF
BLOCKS = {
    "pc.ram": PostcopyBlock(BlockSpec("pc.ram", 1000 * PAGE)),
    "huge": PostcopyBlock(BlockSpec("huge", 4 << 20), 2 << 20),
}


def message(kind: int, body: bytes = b"", more: bytes = b"") -> bytes:
    return struct.pack(">HH", kind, len(body)) + body + more


def text(name: str) -> bytes:
    return bytes([len(name)]) + name.encode()


def request(name: str, offset: int, length: int) -> bytes:
    return message(3, struct.pack(">QI", offset, length) + text(name))


def bits_of(name: str, bits: bytes, mark: int = END_MARK) -> bytes:
    more = struct.pack(">Q", len(bits)) + bits + struct.pack(">Q", mark)
    return message(5, text(name), more)


def read(data: bytes) -> list[Message]:
    return list(ReturnPath(BLOCKS).feed(data))


ALL: list[tuple[bytes, Message | None]] = [
    (message(1, bytes(4)), Shut(0)),
    (message(2, b"\0\0\0\3"), Pong(3)),
    (request("pc.ram", 5 * PAGE, PAGE), Request("pc.ram", 5, 1)),
    (message(4, struct.pack(">QI", 0, PAGE)), Request("pc.ram", 0, 1)),
    (bits_of("pc.ram", bytes(128)), Received("pc.ram", bytes(128))),
    (message(6, b"\0\0\0\1"), Resumed(1)),
    (message(7), None),
]
STREAM = b"".join(data for data, _ in ALL)
MESSAGES = [found for _, found in ALL if found is not None]


def test_every_message_is_read() -> None:
    assert read(STREAM) == MESSAGES


@given(st.lists(st.integers(0, len(STREAM))))
def test_pieces_make_no_difference(cuts: list[int]) -> None:
    path = ReturnPath(BLOCKS)
    found: list[Message] = []
    bounds = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(bounds):
        found += path.feed(STREAM[start:end])
    assert found == MESSAGES


@given(st.binary(max_size=64), st.integers(0, len(ALL)))
def test_any_bytes_are_messages_of_the_snapshot_or_an_error(data: bytes, before: int) -> None:
    try:
        found = read(b"".join(part for part, _ in ALL[:before]) + data)
    except QemuError:
        return
    for item in found:
        if isinstance(item, Request):
            spec = BLOCKS[item.block].spec
            assert 0 <= item.first < item.first + item.npages <= spec.length // PAGE


def test_request_for_a_large_page_is_for_all_of_its_pages() -> None:
    assert read(request("huge", 2 << 20, 2 << 20)) == [Request("huge", 512, 512)]


@pytest.mark.parametrize(
    "data",
    [
        message(0),
        message(8),
        message(1, bytes(8)),
        message(7, b"\0"),
        message(3, bytes(400)),
        message(3, b"\0"),
        message(4, struct.pack(">QI", 0, PAGE)),
        request("no.such", 0, PAGE),
        request("pc.ram", 1, PAGE),
        request("pc.ram", 0, PAGE - 1),
        request("pc.ram", 0, 0),
        request("pc.ram", 1000 * PAGE, PAGE),
        request("pc.ram", (1 << 64) - PAGE, PAGE),
        request("huge", 0, PAGE),
        message(3, struct.pack(">QI", 0, PAGE) + b"\7pc.ram"),
        bits_of("no.such", bytes(128)),
        bits_of("pc.ram", bytes(124)),
        bits_of("pc.ram", bytes(129)),
        bits_of("pc.ram", bytes(128), END_MARK + 1),
        message(5, text("pc.ram"), struct.pack(">Q", 1 << 60)),
    ],
)
def test_what_cannot_be_a_message_is_refused(data: bytes) -> None:
    with pytest.raises(QemuError, match="the destination sent"):
        read(data)


def test_block_must_fit_the_pages_of_its_memory() -> None:
    with pytest.raises(UsageError, match="cannot be in memory with pages of 2097152 bytes"):
        PostcopyBlock(BlockSpec("pc.ram", 3 << 20), 2 << 20)


def test_a_request_may_refer_to_a_block_that_another_reader_saw() -> None:
    path = ReturnPath(BLOCKS)
    with pytest.raises(QemuError, match="before any block"):
        list(path.feed(message(4, struct.pack(">QI", 4096, 4096))))
    path = ReturnPath(BLOCKS)
    path.last_block = next(iter(BLOCKS))
    (found,) = path.feed(message(4, struct.pack(">QI", 4096, 4096)))
    assert found == Request(path.last_block, 1, 1)
