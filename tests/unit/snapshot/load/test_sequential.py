"""Loading sequential streams: whole, foreign and untrusted ones."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import (
    BlockMismatch,
    Cancelled,
    FileMemory,
    NotSupported,
    PyqmigrateError,
    RamBlock,
    SnapshotError,
    save,
)
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.sequential import encode_head
from pyqmigrate.format.stream.writer import RAM_EOS, RAM_SECTION_ID, encode_end, encode_part_header
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.snapshot.load.sequential import (
    DeviceSection,
    SequentialLoadReport,
    start_sequential_load,
)
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from tests.harness.examples import some
from tests.harness.kernel import memfd
from tests.harness.page_records import CONTINUE, PAGE, XBZRLE, ZERO, str8, word
from tests.harness.snapshots import KNOWN, SLOW, Bytes, known_memory, ram
from tests.harness.stream_builders import (
    blocks,
    capabilities,
    configured,
    described,
    device,
    entry,
    full,
)

pytestmark = pytest.mark.usefixtures("same_descriptors")

TWO = [BlockSpec("a", 8192), BlockSpec("b", 4096)]
STALE = 0x77


def written(path: Path, *sections: bytes, head: bytes | None = None, tail: bytes = b"") -> Path:
    """A stream whose PARTs have these records."""
    parts = [encode_part_header() + records + RAM_EOS for records in sections]
    end = tail or encode_end(sections=b"", description=None, switchover_start=False, page_size=4096)
    path.write_bytes((head or encode_head("pc", TWO)) + b"".join(parts) + end)
    return path


def loaded(path: Path, **options: object) -> tuple[SequentialLoadReport, dict[str, Bytes]]:
    """Both blocks of a stream of TWO, into memory that was not zero."""
    memories = {s.name: np.full(s.length, STALE, dtype=np.uint8) for s in TWO}
    source = StreamFile.open(path)
    try:
        return start_sequential_load(source, memories, **options).wait(), memories  # type: ignore[arg-type]
    finally:
        source.close()


def refusal(path: Path, **options: object) -> SnapshotError:
    with pytest.raises(SnapshotError) as caught:
        loaded(path, **options)
    return caught.value


def page(value: int) -> bytes:
    return bytes([value]) * 4096


def test_pages_that_no_record_mentions_are_zero_or_left(tmp_path: Path) -> None:
    path = written(tmp_path / "x", word(4096, PAGE) + str8(b"a") + page(1))
    report, memories = loaded(path)
    assert memories["a"].tobytes() == page(0) + page(1)
    assert memories["b"].tobytes() == page(0)
    assert (report.data_pages, report.zero_pages) == (1, 2)
    report, memories = loaded(path, clear="leave")
    assert memories["a"].tobytes() == page(STALE) + page(1)
    assert memories["b"].tobytes() == page(STALE)
    assert (report.data_pages, report.zero_pages) == (1, 0)


def test_block_of_the_last_record_goes_on_in_the_next_section(tmp_path: Path) -> None:
    path = written(
        tmp_path / "x", word(0, PAGE) + str8(b"b") + page(1), word(0, PAGE | CONTINUE) + page(2)
    )
    assert loaded(path)[1]["b"].tobytes() == page(2)


def test_change_applies_to_what_the_stream_said_before(tmp_path: Path) -> None:
    change = word(0, XBZRLE | CONTINUE) + b"\x01\x00\x04\x05\x02hi"
    path = written(tmp_path / "x", word(0, PAGE) + str8(b"b") + page(1), change)
    assert loaded(path)[1]["b"].tobytes() == page(1)[:5] + b"hi" + page(1)[7:]


@pytest.mark.parametrize(("clear", "around"), [("zero", 0), ("leave", STALE)])
def test_change_to_an_unmentioned_page_applies_to_zeros_or_memory(
    tmp_path: Path, clear: str, around: int
) -> None:
    path = written(tmp_path / "x", word(0, XBZRLE) + str8(b"b") + b"\x01\x00\x04\x05\x02hi")
    expected = page(around)[:5] + b"hi" + page(around)[7:]
    assert loaded(path, clear=clear)[1]["b"].tobytes() == expected


def test_file_memory_is_loaded_and_punched(tmp_path: Path) -> None:
    path = written(
        tmp_path / "x", word(0, ZERO) + str8(b"a") + b"\0" + word(4096, PAGE | CONTINUE) + page(3)
    )
    with memfd(8192) as fd:
        os.pwrite(fd, page(STALE) * 2, 0)
        source = StreamFile.open(path)
        start_sequential_load(source, {"a": FileMemory(fd)}, skip_unknown_blocks=True).wait()
        source.close()
        assert os.pread(fd, 8192, 0) == page(0) + page(3)
        assert os.fstat(fd).st_blocks == 8


def test_device_sections_are_handed_back_in_order(tmp_path: Path) -> None:
    sections = full(7, "timer", b"12345") + full(8, "odd", b"", instance=3)
    tail = encode_end(
        sections=sections,
        switchover_start=True,
        page_size=4096,
        description=described(device("timer", 5), device("odd", 0, instance=3)),
    )
    report, _ = loaded(written(tmp_path / "x", tail=tail))
    assert report.devices == (
        DeviceSection("timer", b"12345", 0, 1),
        DeviceSection("odd", b"", 3, 1),
    )


def test_blocks_without_memory_are_read_over_where_asked(tmp_path: Path) -> None:
    path = written(
        tmp_path / "x",
        word(0, PAGE)
        + str8(b"a")
        + page(1)
        + word(4096, XBZRLE | CONTINUE)
        + b"\x01\x00\x00"
        + word(0, PAGE)
        + str8(b"b")
        + page(2),
    )
    source, memory = StreamFile.open(path), bytearray(page(STALE))
    report = start_sequential_load(source, {"b": memory}, skip_unknown_blocks=True).wait()
    with pytest.raises(BlockMismatch, match="'a'"):
        start_sequential_load(source, {"b": memory})
    source.close()
    assert memory == page(2)
    assert report.skipped == ("a",)


@pytest.mark.parametrize(
    "memories", [{"a": bytearray(8192), "b": bytearray(8192)}, {"a": bytearray(8192), "c": b""}]
)
def test_memories_that_do_not_fit_are_refused_before_the_start(
    tmp_path: Path, memories: dict[str, bytearray]
) -> None:
    source = StreamFile.open(written(tmp_path / "x"))
    with pytest.raises(BlockMismatch):
        start_sequential_load(source, memories, skip_unknown_blocks=True)
    source.close()


def test_shared_block_without_records_keeps_its_memory(tmp_path: Path) -> None:
    head = configured(capabilities("x-ignore-shared")) + blocks(
        entry("a", 8192, word(0, 0)),
        entry("b", 4096, word(0, 0)),
        total=12288,
        section_id=RAM_SECTION_ID,
    )
    path = written(tmp_path / "x", word(0, ZERO) + str8(b"b") + b"\0", head=head)
    report, memories = loaded(path)
    assert memories["a"].tobytes() == page(STALE) * 2
    assert memories["b"].tobytes() == page(0)
    assert report.skipped == ("a",)


def test_mapped_ram_file_is_of_another_kind(tmp_path: Path) -> None:
    save(tmp_path / "x", [RamBlock("a", bytes(8192)), RamBlock("b", bytes(4096))])
    with pytest.raises(NotSupported, match="mapped-ram"):
        loaded(tmp_path / "x")


def test_compressed_page_is_not_supported(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="compressed"):
        loaded(written(tmp_path / "x", word(0, 0x100) + str8(b"a")))


@pytest.mark.parametrize(
    ("record", "block", "field"),
    [
        (word(0, 0x80), None, "flags"),
        (word(0, ZERO | CONTINUE), None, "name"),
        (word(0, ZERO) + str8(b"nobody"), "nobody", "name"),
        (word(8192, ZERO) + str8(b"a"), "a", "offset"),
        (word(0, XBZRLE) + str8(b"b") + b"\x01\x00\x01\x80", "b", "xbzrle"),
    ],
)
def test_refusal_says_where_and_what(
    tmp_path: Path, record: bytes, block: str | None, field: str
) -> None:
    error = refusal(written(tmp_path / "x", record))
    assert error.offset == len(encode_head("pc", TWO)) + 5
    assert (error.block, error.field) == (block, field)


def test_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "x", word(0, PAGE) + str8(b"a") + page(1), b"")
    data = path.read_bytes()
    whole = len(data) - len(described()) - 5
    for size in [*range(120), *range(4000, whole)][::3]:
        path.write_bytes(data[:size])
        error = refusal(path)
        assert error.offset is not None and error.offset <= size


def test_part_that_swallows_its_end_is_refused(tmp_path: Path) -> None:
    """A name length that is wrong makes a name of what follows."""
    path = written(tmp_path / "x", word(0, PAGE) + b"\xff" + b"a" + page(1))
    assert refusal(path).field == "name"


@some
@given(data=st.data())
def test_mutated_stream_never_does_more_than_fail(tmp_path: Path, data: st.DataObject) -> None:
    records = (
        word(0, PAGE)
        + str8(b"a")
        + page(5)
        + word(4096, ZERO | CONTINUE)
        + b"\0"
        + word(0, XBZRLE)
        + str8(b"b")
        + b"\x01\x00\x04\x05\x02hi"
    )
    stream = bytearray(written(tmp_path / "x", records, records).read_bytes())
    interesting = [k for k in range(len(stream)) if stream[k] != 5]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(interesting))
        stream[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del stream[data.draw(st.integers(0, len(stream))) :]
    (tmp_path / "x").write_bytes(stream)
    try:
        report, memories = loaded(tmp_path / "x")
    except PyqmigrateError:
        return
    assert sum(map(len, memories.values())) == report.stream.total_ram


def test_huge_lengths_cost_no_memory(tmp_path: Path) -> None:
    """Nothing is allocated for a block that the caller has no memory for."""
    head = encode_head("pc", [BlockSpec("huge", 1 << 62), BlockSpec("b", 4096)])
    source = StreamFile.open(written(tmp_path / "x", head=head))
    report = start_sequential_load(source, {"b": bytearray(4096)}, skip_unknown_blocks=True).wait()
    source.close()
    assert report.skipped == ("huge",)


def test_tens_of_thousands_of_empty_parts_are_walked_fast(tmp_path: Path) -> None:
    path = written(tmp_path / "x", *[b""] * 50_000, word(0, ZERO) + str8(b"b") + b"\0")
    started = time.monotonic()
    loaded(path)
    assert time.monotonic() - started < 20


def test_cancelled_load_ends_soon(tmp_path: Path) -> None:
    memory = ram(2000, density=1)
    path = tmp_path / "x"
    start_sequential_save(path, [RamBlock("ram", memory)]).wait()
    source = StreamFile.open(path)
    job = start_sequential_load(source, {"ram": memory.copy()}, max_bandwidth=SLOW)
    time.sleep(0.2)
    job.cancel()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        job.result(5)
    source.close()
    assert time.monotonic() - started < 1


def test_progress_counts_a_page_once(tmp_path: Path) -> None:
    path = written(tmp_path / "x", *[word(0, PAGE) + str8(b"b") + page(n) for n in range(5)])
    memories = {s.name: bytearray(s.length) for s in TWO}
    source = StreamFile.open(path)
    job = start_sequential_load(source, memories)
    report = job.result()
    source.close()
    assert job.progress.bytes_total == job.progress.bytes_done == 12288
    assert report.data_pages == 5


def test_big_memory_comes_back_through_small_windows(tmp_path: Path) -> None:
    memory = np.concatenate([known_memory(seed) for seed in range(8)])
    path = tmp_path / "x"
    start_sequential_save(path, [RamBlock("ram", memory)]).wait()
    with memfd(len(memory)) as fd:
        os.pwrite(fd, bytes([STALE]) * len(memory), 0)
        source = StreamFile.open(path)
        report = start_sequential_load(source, {"ram": FileMemory(fd)}).wait()
        source.close()
        assert os.pread(fd, len(memory), 0) == memory.tobytes()
    assert report.data_pages + report.zero_pages == 8 * KNOWN
