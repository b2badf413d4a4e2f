"""The head of a seal: what is written is read, and whatever else there is, is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.digest import DIGEST_SIZE, Algorithm, digest_of_all
from pyqmigrate.format.seal import (
    HEAD_MAX,
    PIECE,
    SEALED_MAX,
    SealHead,
    SealLine,
    count_pieces,
    is_seal,
)
from pyqmigrate.format.stream.mapped_ram import OFFSET_MAX, PAGE_SIZES, BlockLayout, ByteOrder
from tests.harness.examples import some

gaps = st.integers(0, 1 << 40)
names = st.binary(min_size=1, max_size=255).map(lambda raw: raw.decode("utf-8", "surrogateescape"))


@st.composite
def heads(draw: st.DrawFn) -> SealHead:
    """With blocks one after another, as they are in a file."""
    at = offset = draw(gaps)
    blocks = []
    for _ in range(draw(st.integers(0, 4))):
        page_size = draw(st.sampled_from(PAGE_SIZES))
        header = at + draw(gaps)
        bitmap = header + 28 + draw(gaps)
        length = draw(st.integers(1, 1 << 30)) * page_size
        pages = bitmap + length // page_size // 8 + 1 + draw(gaps)
        blocks.append(BlockLayout(draw(names), length, page_size, header, bitmap, pages))
        at = blocks[-1].pages_end
    return SealHead(
        draw(st.sampled_from(Algorithm)),
        draw(st.integers(0, 5 * PIECE)),
        draw(st.integers(-OFFSET_MAX, OFFSET_MAX)),
        draw(st.booleans()),
        offset,
        tuple(blocks),
        draw(st.sampled_from(["little", "big"])),
    )


DIGESTS = random.Random(1).randbytes(3 * DIGEST_SIZE)
HEAD = SealHead(
    Algorithm.XXH3_128,
    2 * PIECE + 1,
    1_700_000_000_123_456_789,
    True,
    4096,
    (BlockLayout("pc.ram", 1 << 30, 4096, 4200, 4228, PIECE),),
)


def changed(**changes: Any) -> bytes:
    """The line of HEAD with other values; None takes a key away."""
    value = json.loads(HEAD.encode(DIGESTS)) | changes
    value = {key: item for key, item in value.items() if item is not None}
    return json.dumps(value).encode() + b"\n"


@some
@given(heads(), st.data())
def test_what_is_written_is_read(head: SealHead, data: st.DataObject) -> None:
    digests = data.draw(st.binary(min_size=head.digests_size, max_size=head.digests_size))
    line = head.encode(digests)
    assert is_seal(line[:64])
    read = SealLine.decode(line)
    assert read.head == head
    read.check([digests])
    read.check([digests[:20], digests[20:]])


@some
@given(st.integers(0, SEALED_MAX))
def test_every_byte_is_in_a_piece(size: int) -> None:
    pieces = count_pieces(size)
    assert (pieces - 1) * PIECE < size <= pieces * PIECE or (pieces, size) == (0, 0)


def test_keys_may_be_added_before_the_last() -> None:
    front = HEAD.encode(DIGESTS).partition(b', "digest"')[0] + b', "more": [1, {"a": "digest"}]'
    digest = digest_of_all(Algorithm.XXH3_128, [DIGESTS, front]).hex()
    read = SealLine.decode(front + b', "digest": "' + digest.encode() + b'"}\n')
    read.check([DIGESTS])
    assert read.head == HEAD


@pytest.mark.parametrize("algorithm", Algorithm)
def test_every_flipped_bit_of_a_head_is_found(algorithm: Algorithm) -> None:
    line = replace(HEAD, algorithm=algorithm).encode(DIGESTS)
    for bit in range(len(line) * 8):
        damaged = bytearray(line)
        damaged[bit // 8] ^= 1 << bit % 8
        text, newline, _ = bytes(damaged).partition(b"\n")
        with pytest.raises(SnapshotError) as caught:
            SealLine.decode(text + newline).check([DIGESTS])
        assert caught.value.field == "seal"


def test_other_digests_are_found() -> None:
    read = SealLine.decode(HEAD.encode(DIGESTS))
    for other in (DIGESTS[:-1], DIGESTS + b"\0", DIGESTS[16:32] + DIGESTS[:16] + DIGESTS[32:]):
        with pytest.raises(SnapshotError, match="damaged"):
            read.check([other])


HOSTILE = {
    "nothing": b"",
    "no newline": HEAD.encode(DIGESTS)[:-1],
    "no JSON": b"seal\n",
    "no UTF-8": b'{"format": "\xff"}\n',
    "a list": b"[]\n",
    "a number": b"1\n",
    "deep": b"[" * 200_000 + b"\n",
    "a huge number": b'{"format": "pyqmigrate-seal", "version": ' + b"9" * 20_000 + b"}\n",
    "too long": b" " * HEAD_MAX + b"\n",
    "another format": changed(format="other"),
    "another version": changed(version=2),
    "a true version": changed(version=True),
    "another piece": changed(piece=4096),
    "an unknown algorithm": changed(algorithm="crc32"),
    "a list for an algorithm": changed(algorithm=["xxh3-128"]),
    "an object for an algorithm": changed(algorithm={}),
    "no algorithm": changed(algorithm=None),
    "a negative size": changed(size=-1),
    "a huge size": changed(size=SEALED_MAX + 1),
    "a float": changed(size=1.0),
    "a string for a size": changed(size="1"),
    "no size": changed(size=None),
    "a huge time": changed(mtime_ns=1 << 70),
    "clear pages of a kind": changed(clear_pages_zero=1),
    "no word on clear pages": changed(clear_pages_zero=None),
    "no digest": changed(digest=None),
    "a digest of no digits": changed(digest="xyz"),
    "a number for a digest": changed(digest=1),
    "no blocks": changed(blocks=None),
    "an object for blocks": changed(blocks={}),
    "a string for a block": changed(blocks=["pc.ram"]),
    "a block without numbers": changed(blocks=[{"name": "pc.ram"}]),
    "a block of a page of one byte": changed(
        blocks=[{"name": "a", "length": 1, "page_size": 1, "header": 1, "bitmap": 1, "pages": 1}]
    ),
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_heads_are_refused(line: bytes) -> None:
    with pytest.raises(SnapshotError) as caught:
        SealLine.decode(line)
    assert caught.value.field == "seal"


def test_a_short_digest_is_not_right() -> None:
    with pytest.raises(SnapshotError, match="damaged"):
        SealLine.decode(changed(digest="ab")).check([DIGESTS])


def test_blocks_that_do_not_fit_are_left_out() -> None:
    block = HEAD.blocks[0]
    many = replace(HEAD, blocks=tuple(block._replace(name=f"ram{n}") for n in range(20_000)))
    line = many.encode(DIGESTS)
    assert len(line) <= HEAD_MAX
    assert SealLine.decode(line).head == replace(HEAD, blocks=())


def test_a_seal_without_a_bitmap_order_is_of_little_endian_bitmaps() -> None:
    digests = bytes(16)
    head = SealHead(Algorithm.SHA256, 5, 0, True)
    front = head.encode(digests).rpartition(b', "digest"')[0]
    front = front.replace(b', "bitmap_order": "little"', b"")
    digest = digest_of_all(Algorithm.SHA256, [digests, front])
    line = SealLine.decode(front + b', "digest": "' + digest.hex().encode() + b'"}\n')
    line.check([digests])
    assert line.head == head


@pytest.mark.parametrize("order", ["little", "big"])
def test_the_order_of_bitmaps_is_kept(order: ByteOrder) -> None:
    head = SealHead(Algorithm.SHA256, 5, 0, True, bitmap_order=order)
    assert SealLine.decode(head.encode(bytes(16))).head == head
    with pytest.raises(SnapshotError, match="bitmap_order"):
        SealLine.decode(head.encode(bytes(16)).replace(order.encode(), b"middle"))
