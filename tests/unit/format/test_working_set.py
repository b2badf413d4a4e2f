"""The lines of page tables and working sets round-trip, and damage is detected."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import SnapshotError, UsageError
from pyqmigrate.format.page_table import PAGE_TABLE, PageTableLine
from pyqmigrate.format.snapshot_companion import LINE_MAX
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.mapped_ram import OFFSET_MAX, PAGE_SIZES
from pyqmigrate.format.working_set import WORKING_SET, TouchedRun, WorkingSet, WorkingSetLine
from tests.harness.examples import some

SNAPSHOT = SnapshotId(1 << 30, 1_700_000_000_000_000_001, bytes(range(16)))
BLOCKS = (BlockSpec("pc.ram", 1 << 22), BlockSpec("vga.vram", 1 << 20, 65536))
PAGES = [1024, 16]
RUNS = [TouchedRun(0, 5, 100), TouchedRun(1, 0, 16), TouchedRun(0, 1023, 1)]

names = st.binary(min_size=1, max_size=255).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
identities = st.builds(
    SnapshotId,
    st.integers(0, OFFSET_MAX),
    st.integers(-OFFSET_MAX, OFFSET_MAX),
    st.none() | st.binary(min_size=16, max_size=16),
)


@st.composite
def block_lists(draw: st.DrawFn) -> tuple[BlockSpec, ...]:
    blocks = []
    for name in draw(st.lists(names, max_size=4, unique=True)):
        page_size = draw(st.sampled_from(PAGE_SIZES))
        blocks.append(BlockSpec(name, draw(st.integers(1, 200)) * page_size, page_size))
    return tuple(blocks)


@st.composite
def working_sets(draw: st.DrawFn, blocks: tuple[BlockSpec, ...]) -> WorkingSet:
    """Runs that do not overlap, in any order."""
    runs = []
    for number, block in enumerate(blocks):
        page, end = 0, block.length // block.page_size
        while page < end and draw(st.booleans()):
            first = draw(st.integers(page, end - 1))
            npages = draw(st.integers(1, end - first))
            runs.append(TouchedRun(number, first, npages))
            page = first + npages
    return WorkingSet(draw(st.permutations(runs)))


def line_of(runs: list[TouchedRun]) -> WorkingSetLine:
    return WorkingSetLine.of(SNAPSHOT, BLOCKS, len(runs), 2.5)


@some
@given(st.data(), identities, block_lists(), st.integers(0, 1000))
def test_a_working_set_that_is_written_is_read(
    data: st.DataObject, snapshot: SnapshotId, blocks: tuple[BlockSpec, ...], seconds: int
) -> None:
    working_set = data.draw(working_sets(blocks))
    line = WorkingSetLine.of(snapshot, blocks, len(working_set), seconds / 8)
    text = line.encode(working_set)
    assert len(text) % 4096 == 0
    assert WORKING_SET.is_ours(text[:64])
    body = working_set.encode()
    read = WorkingSetLine.decode(text + body)
    assert (read.snapshot, read.blocks, read.seconds) == (snapshot, blocks, seconds / 8)
    assert read.body_size == len(body)
    assert read.line.length == len(text)
    assert read.decode_runs(body) == working_set
    assert [*read.decode_runs(body)] == [*working_set]


@some
@given(identities, block_lists(), st.data())
def test_a_page_table_that_is_written_is_read(
    snapshot: SnapshotId, blocks: tuple[BlockSpec, ...], data: st.DataObject
) -> None:
    line = PageTableLine.of(snapshot, blocks)
    body = data.draw(st.binary(min_size=16, max_size=16)) * (line.body_size // 16)
    text = line.encode([body])
    assert len(text) % 4096 == 0
    assert PAGE_TABLE.is_ours(text[:64])
    assert not WORKING_SET.is_ours(text[:64])
    read = PageTableLine.decode(text + body)
    assert (read.snapshot, read.blocks, read.body_size) == (snapshot, blocks, len(body))
    read.line.check([body[:7], body[7:]])
    if body:
        with pytest.raises(SnapshotError, match="damaged"):
            read.line.check([body[:-1] + bytes([body[-1] ^ 1])])


@some
@given(st.data())
def test_a_flipped_bit_of_a_working_set_is_found(data: st.DataObject) -> None:
    working_set = WorkingSet(RUNS)
    text = line_of(RUNS).encode(working_set)
    whole = bytearray(text + working_set.encode())
    used = len(text.rstrip()) + 1  # a blank more or less is nothing
    place = data.draw(st.integers(0, used - 2) | st.integers(len(text), len(whole) - 1))
    whole[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SnapshotError):
        WorkingSetLine.decode(bytes(whole)).decode_runs(bytes(whole[len(text) :]))


@some
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    starts = [b"", WORKING_SET.start, PAGE_TABLE.start]
    for text in [*starts, *(data + b"\n" for data in starts)]:
        with pytest.raises(SnapshotError):
            WorkingSetLine.decode(text + data)
        with pytest.raises(SnapshotError):
            PageTableLine.decode(text + data)


def changed(*keys: str | int, to: object) -> bytes:
    """A line with another value at a place of its JSON; ``...`` takes the key away."""
    value = json.loads(line_of(RUNS).encode(WorkingSet(RUNS)))
    inner: Any = value
    for key in keys[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = to
    text = json.dumps(value).encode()
    return text.ljust(-(-(len(text) + 1) // 4096) * 4096 - 1) + b"\n"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("version",), 2, "version 2 .* not supported"),
        (("snapshot",), [], "snapshot is missing"),
        (("snapshot", "size"), -1, "size is out of its range"),
        (("snapshot", "mtime_ns"), ..., "mtime_ns is not a whole number"),
        (("snapshot", "seal"), "xx", "seal is not a digest"),
        (("snapshot", "seal"), "00", "seal has 1 bytes"),
        (("blocks",), {}, "expected a list of at most"),
        (("blocks", 0), 7, r"blocks\[0\] has no name"),
        (("blocks", 0, "length"), 4097, r"blocks\[0\]: .*multiple|blocks\[0\]"),
        (("blocks", 0, "page_size"), 3, r"blocks\[0\]"),
        (("blocks", 1, "name"), "pc.ram", "duplicate block name"),
        (("blocks", 0, "length"), OFFSET_MAX // 4096 * 4096, "longer than a file can be"),
        (("runs",), (1 << 20) + 1, "runs, more than"),
        (("runs",), "many", "runs is not a whole number"),
        (("seconds",), "long", "seconds is not a number"),
        (("seconds",), 1e10, "seconds is out of its range"),
        (("seconds",), float("nan"), "seconds is out of its range"),
        (("digest",), "00", "digest has 1 bytes"),
        (("digest",), ..., "does not end with its digest"),
    ],
)
def test_a_value_that_cannot_be_is_named(
    keys: tuple[str | int, ...], value: object, message: str
) -> None:
    with pytest.raises(SnapshotError, match=message) as raised:
        WorkingSetLine.decode(changed(*keys, to=value))
    assert raised.value.field == "working set"


@pytest.mark.parametrize(
    "run",
    [
        TouchedRun(2, 0, 1),
        TouchedRun(0, 1024, 1),
        TouchedRun(1, 15, 2),
        TouchedRun(0, (1 << 63) - 1, 1),
    ],
)
def test_runs_outside_of_their_block_are_neither_written_nor_read(run: TouchedRun) -> None:
    working_set = WorkingSet([run])
    with pytest.raises(UsageError, match="has no pages"):
        line_of([run]).encode(working_set)
    body = working_set.encode()
    text = line_of([run]).line.encode([body])
    with pytest.raises(SnapshotError, match="has no pages"):
        WorkingSetLine.decode(text).decode_runs(body)


def test_no_more_pages_than_all_blocks_have_are_taken() -> None:
    runs = [TouchedRun(0, 0, 1024)] * 2
    body = WorkingSet(runs).encode()
    text = line_of(runs).line.encode([body])
    with pytest.raises(SnapshotError, match="more pages than all blocks"):
        WorkingSetLine.decode(text).decode_runs(body)


@pytest.mark.parametrize(
    "run", [(-1, 0, 1), (0, -1, 1), (0, 0, 0), (1 << 32, 0, 1), (0, 0, 1 << 32)]
)
def test_what_cannot_be_a_run_is_refused(run: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="cannot be a run"):
        WorkingSet([TouchedRun(*run)])


def test_runs_that_end_within_one_are_refused() -> None:
    with pytest.raises(SnapshotError, match="cut off"):
        WorkingSet.decode(bytes(17))


def test_a_line_that_is_too_long_is_not_written() -> None:
    blocks = [BlockSpec(f"{n:0255}", 4096) for n in range(LINE_MAX // 300)]
    with pytest.raises(UsageError, match="first line"):
        PageTableLine.of(SNAPSHOT, blocks).encode([])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (SNAPSHOT, None),
        (SnapshotId(1 << 30, 7, SNAPSHOT.seal), None),
        (SnapshotId(1 << 30, SNAPSHOT.mtime_ns), None),
        (SnapshotId(1 << 30, 7), "modified"),
        (SnapshotId(1 << 30, SNAPSHOT.mtime_ns, bytes(16)), "another seal"),
        (SnapshotId(7, SNAPSHOT.mtime_ns, SNAPSHOT.seal), "7 bytes"),
    ],
)
def test_a_snapshot_is_known_by_size_and_seal_or_time(
    found: SnapshotId, message: str | None
) -> None:
    difference = SNAPSHOT.differs_from(found)
    assert difference is None if message is None else message in str(difference)
