"""A kept index that is damaged: made anew, whatever was hit, and no word about it."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path

import pytest
import xxhash

from pyqmigrate import SnapshotError
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.sequential import SequentialSnapshot
from tests.harness.stream_builders import page_records, sequential_stream, words

PAGE = 4096


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequential stream with a page, a zero page, and changes to the page by XBZRLE."""
    path = tmp_path_factory.mktemp("stream") / "s.sequential"
    change = words(0x40 | 0x20) + struct.pack(">BH", 1, 3) + bytes([0, 1, 0xAA])
    path.write_bytes(sequential_stream(page_records() + change * 2))
    return path


@pytest.fixture(scope="module")
def whole(stream: Path) -> bytes:
    with open_snapshot(stream, index=stream.with_name("index")) as snapshot:
        assert content(snapshot)[:2] == b"\xaa\1"
    return stream.with_name("index").read_bytes()


def content(snapshot: SequentialSnapshot) -> bytes:
    return b"".join(block.read(0, block.length) for block in snapshot.blocks.values())


def check_recovers(stream: Path, damaged: bytes, whole: bytes) -> None:
    index = stream.with_name("index")
    index.write_bytes(damaged)
    with open_snapshot(stream, index=index) as snapshot:
        assert isinstance(snapshot, SequentialSnapshot)
        assert content(snapshot)[:2] == b"\xaa\1"
    assert index.read_bytes() == whole


def test_every_flipped_byte_of_an_index_is_made_good(stream: Path, whole: bytes) -> None:
    rng = random.Random(1)
    ends = [*range(8, 400), *range(len(whole) - 200, len(whole))]
    for at in {*ends, *(rng.randrange(8, len(whole)) for _ in range(100))}:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        check_recovers(stream, bytes(damaged), whole)


def test_every_cut_of_an_index_is_made_good(stream: Path, whole: bytes) -> None:
    rng = random.Random(2)
    for length in [0, *range(8, 300), *(rng.randrange(8, len(whole)) for _ in range(50))]:
        check_recovers(stream, whole[:length], whole)


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.long)])
def test_a_forged_index_is_a_snapshot_error_at_worst(
    stream: Path, whole: bytes, count: int
) -> None:
    """Its digest is right, and proves nothing: every number is checked, and changes to a page that
    are elsewhere in the file may not fit it."""
    index, rng = stream.with_name("index"), random.Random(count)
    for _ in range(count):
        body = bytearray(whole[24:])
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(min(len(body), rng.choice((700, 700, 1 << 20))))
            kind = rng.randrange(4)
            if kind == 0:
                body[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                number = rng.choice((b"\xff" * 8, b"1e99", b"null", b"[[]]", b"-1,", bytes(8)))
                body[at : at + len(number)] = number
            elif kind == 2:
                body[at:at] = rng.randbytes(rng.choice((1, 8, 24)))
            else:
                del body[at : at + rng.choice((1, 8, 24))]
        index.write_bytes(b"qmindex2" + xxhash.xxh3_128(bytes(body)).digest() + body)
        with open_snapshot(stream, index=index) as snapshot:
            assert isinstance(snapshot, SequentialSnapshot)
            with contextlib.suppress(SnapshotError):
                content(snapshot)
    index.unlink()
