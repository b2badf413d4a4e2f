"""Stored snapshots round-trip; damage, and every wrong number under a right digest, is refused."""

from __future__ import annotations

import json
import tracemalloc
from array import array
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import NotSupported, SnapshotError, UsageError
from pyqmigrate.format.store import snapshot as module
from pyqmigrate.format.store.keyed import keyed_digest
from pyqmigrate.format.store.snapshot import Extent, FillRuns, PageRuns, StoredSnapshot
from pyqmigrate.format.store.snapshot_head import HEAD_MAX, HeadLine, check_labels
from pyqmigrate.format.store.zstd import compress, decompress
from tests.harness.examples import some
from tests.harness.store_documents import KEY, example_snapshot, snapshots

EXAMPLE = example_snapshot()


def decode(data: bytes, key: bytes = KEY) -> StoredSnapshot:
    return StoredSnapshot.decode(key, data, "monday")


def with_digests(head: dict[str, Any], body: bytes) -> bytes:
    """A document of any head and body, with right digests."""
    head.pop("digest", None)
    front = json.dumps(head).encode()[:-1]
    line = front + b', "digest": "%s"}\n' % keyed_digest(KEY, [front]).hex().encode()
    return line + body + keyed_digest(KEY, [line, body])


def parts() -> tuple[dict[str, Any], bytes]:
    """The head and the body, not compressed, of the example."""
    data = EXAMPLE.encode(KEY)
    line = HeadLine.decode(KEY, data, "monday")
    return json.loads(data[: line.length]), decompress(data[line.length : -16], line.body_size)


def with_body(body: bytes) -> bytes:
    head, _ = parts()
    compressed = compress(body, 1)
    return with_digests(head | {"body": len(compressed), "body_size": len(body)}, compressed)


@some
@given(snapshots())
def test_a_document_that_is_written_is_read(snapshot: StoredSnapshot) -> None:
    data = snapshot.encode(KEY)
    name = snapshot.head.name
    assert StoredSnapshot.decode(KEY, data, name) == snapshot
    line = HeadLine.decode(KEY, data[: data.index(b"\n") + 1], name)
    assert line.head == snapshot.head
    assert (line.total, line.packs) == (len(data), len(snapshot.packs))


@some
@given(st.data())
def test_a_flipped_bit_is_found_wherever_it_is(data: st.DataObject) -> None:
    document = bytearray(EXAMPLE.encode(KEY))
    place = data.draw(st.integers(0, len(document) - 1))
    document[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises((SnapshotError, NotSupported)):
        decode(bytes(document))


@some
@given(st.integers(0, 2000))
def test_a_document_that_is_cut_off_or_too_long_is_refused(length: int) -> None:
    document = EXAMPLE.encode(KEY)
    for data in (document[:length], document + bytes(1)):
        if data != document:
            with pytest.raises(SnapshotError):
                decode(data)


def test_a_document_of_another_store_or_name_is_refused() -> None:
    document = EXAMPLE.encode(KEY)
    with pytest.raises(SnapshotError, match="another store"):
        decode(document, b"k" * 32)
    with pytest.raises(SnapshotError, match="stored as 'monday'"):
        StoredSnapshot.decode(KEY, document, "tuesday")


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1}, {"size": 1 << 47}, {"size": True}, {"size": 1.5}, {"mtime_ns": 1 << 63},
        {"machine": None}, {"machine": "m" * 256}, {"uuid": "00"}, {"uuid": 5}, {"added_ns": "now"},
        {"parent": "../x"}, {"parent": 3}, {"source": "other"}, {"source": []},
        {"labels": []}, {"labels": {"a": 1}}, {"labels": {"a": "x" * 20000}},
        {"blocks": {}}, {"blocks": [5]}, {"blocks": [{"name": "a", "length": 1, "page_size": 4096}]},
        {"counts": None}, {"counts": {"pages": 1}}, {"packs": 3}, {"packs": -1}, {"packs": 1 << 40},
        {"body": 5}, {"body": 1 << 50}, {"body_size": 5}, {"body_size": 1 << 50},
        {"size": 40 * 4096}, {"format": "x"},
    ],
)  # fmt: skip
def test_a_wrong_value_of_the_head_under_a_right_digest_is_refused(change: dict[str, Any]) -> None:
    head, body = parts()
    compressed = compress(body, 3)
    assert decode(with_digests(dict(head), compressed)) == EXAMPLE
    with pytest.raises(SnapshotError):
        decode(with_digests(head | change, compressed))


def test_another_version_is_not_supported() -> None:
    head, body = parts()
    with pytest.raises(NotSupported, match="version 2"):
        decode(with_digests(head | {"version": 2}, compress(body, 3)))


def runs(**changes: list[int]) -> dict[str, Any]:
    columns = {"firsts": [8, 40], "counts": [10, 5], "packs": [0, 1], "pages": [7, 100]} | changes
    codes = {"firsts": "Q", "counts": "I", "packs": "I", "pages": "I"}
    return {"runs": PageRuns(**{name: array(codes[name], columns[name]) for name in codes})}


@pytest.mark.parametrize(
    "changes",
    [
        runs(counts=[10, 0]),
        runs(packs=[0, 2]),
        runs(pages=[7, 65532]),
        runs(pages=[7, (1 << 32) - 1]),
        runs(firsts=[8, 252]),  # past the end of the file
        runs(firsts=[8, 1 << 60]),
        {"fills": FillRuns(array("Q", [255]), array("I", [2]), array("Q", [1]))},
        {"fills": FillRuns(array("Q", [5]), array("I", [0]), array("Q", [1]))},
        {"packs": (b"p" * 16, b"p" * 16)},
        {"extents": (Extent(0, b""),)},
        {"extents": (Extent(5, b"abc"), Extent(7, b"x"))},
        {"extents": (Extent((1 << 20) - 1, b"ab"),)},
        {"extents": (Extent((1 << 64) - 1, b"ab"),)},
        {"companions": {"/../x": b""}},
        {"companions": {".seal": b""}},
    ],
)
def test_a_wrong_run_extent_or_companion_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SnapshotError, match="stored snapshot monday"):
        decode(replace(EXAMPLE, **changes).encode(KEY))


@some
@given(st.data())
def test_any_number_in_the_body_is_checked(data: st.DataObject) -> None:
    """Whatever the body has, the result is within its bounds, or a SnapshotError."""
    _, original = parts()
    body = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 60) | st.integers(0, len(body) - 1))
        body[at] = data.draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    try:
        found = decode(with_body(bytes(body)))
    except SnapshotError:
        return
    for place, (first, count) in enumerate(zip(found.runs.firsts, found.runs.counts, strict=True)):
        assert first + count <= 256
        assert found.runs.packs[place] < len(found.packs)
        assert found.runs.pages[place] + count <= 65536
    assert all(
        first + count <= 256
        for first, count in zip(found.fills.firsts, found.fills.counts, strict=True)
    )


def test_huge_counts_are_refused_without_memory_for_them() -> None:
    _, body = parts()
    tracemalloc.start()
    try:
        for k in range(9):
            at = 4 * k if k < 6 else 24 + 8 * (k - 6)
            broken = body[:at] + b"\xff\xff\xff\x7f" + body[at + 4 :]
            with pytest.raises(SnapshotError):
                decode(with_body(broken))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_that_claims_another_length_is_not_decompressed() -> None:
    bomb = compress(bytes(64 << 20), 1)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="another length"):
            decompress(bomb, 1000)
        for frame in (b"", b"junk" * 10, bomb[:50], bomb[:-1], bomb + b"x"):
            with pytest.raises(ValueError):
                decompress(frame, 64 << 20 if len(frame) > len(bomb) else 1000)
    finally:
        tracemalloc.stop()


def test_what_no_reader_accepts_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="labels"):
        check_labels({"a": "x" * 20000})
    big = replace(EXAMPLE.head, machine="m" * HEAD_MAX)
    with pytest.raises(UsageError, match="first line"):
        replace(EXAMPLE, head=big).encode(KEY)
    monkeypatch.setattr(module, "BODY_MAX", 100)
    with pytest.raises(UsageError, match="device state"):
        EXAMPLE.encode(KEY)
