"""A sequential stream into files with fixed places, in one pass."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import NotSupported, RamBlock, SnapshotError, UsageError, open_snapshot
from pyqmigrate.export.convert import convert
from pyqmigrate.export.raw import RawReport, unpack
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from pyqmigrate.snapshot.sequential import SequentialSnapshot
from tests.harness import page_records as records
from tests.harness.converted import FORMS, content
from tests.harness.directories import directory_on_disk
from tests.harness.examples import few
from tests.harness.page_records import Record, stream_of
from tests.harness.snapshots import Bytes, ram
from tests.harness.strategies import record_lists
from tests.harness.stream_builders import EOF, RAM_EOS, described, end, part, start, str8, words

PART = 16 << 20
PAGE = 4096


def stream(
    rounds: Sequence[Sequence[Record]], lengths: dict[str, int], *, shared: bool = False
) -> bytes:
    """A sequential stream with these blocks, and a PART for each round; the last one is the END."""
    entries = b"".join(
        str8(name) + words(length) + (words((n + 1) << 32) if shared else b"")
        for n, (name, length) in enumerate(lengths.items())
    )
    capability = (
        b"\5"
        + str8("configuration/capabilities")
        + struct.pack(">II", 1, 1)
        + str8("x-ignore-shared")
    )
    names = [name.encode() for name in lengths]
    bodies = [stream_of(one, names, PAGE) for one in rounds] or [RAM_EOS]
    description = described()
    return (
        b"QEVM"
        + struct.pack(">IBI", 3, 7, 2)
        + b"pc"
        + (capability if shared else b"")
        + start(1, "ram", 4, words(sum(lengths.values()) | 4) + entries + RAM_EOS)
        + b"".join(part(1, body) for body in bodies[:-1])
        + end(1, bodies[-1])
        + EOF
        + struct.pack(">BI", 6, len(description))
        + description
    )


def page(number: int, fill: int) -> Record:
    return Record(0, number, page=bytes([fill]) * PAGE)


def bytes_read() -> int:
    """What this process has asked the kernel for."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.mark.parametrize("form", FORMS)
def test_source_is_read_once(disk: Path, form: str) -> None:
    memory = ram(12288)
    start_sequential_save(disk / "from", [RamBlock("ram", memory)]).wait()
    before = bytes_read()
    convert(disk / "from", disk / "to", to=form)
    assert bytes_read() - before < (disk / "from").stat().st_size * 1.1
    assert content(disk / "to", form) == memory.tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_no_index_is_made(disk: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (disk / "from").write_bytes(stream([[page(3, 1)]], {"ram": 10 * PAGE}))
    monkeypatch.delattr("pyqmigrate.snapshot.sequential.PageIndex")
    convert(disk / "from", disk / "to", to=form)
    assert content(disk / "to", form)[3 * PAGE] == 1


@pytest.mark.parametrize("form", FORMS)
@few
@given(data=st.data())
def test_result_is_that_of_the_twin(form: str, data: st.DataObject) -> None:
    lengths = {"ram": 2 * PART + 5 * PAGE, "rom": 7 * PAGE}
    step = PART // PAGE - 20
    rounds = [
        [
            Record(
                r.block,
                r.number + (r.block == 0) * data.draw(st.integers(0, 1)) * step,
                r.fill,
                r.page,
                r.delta,
            )
            for r in data.draw(record_lists([40, 7], PAGE))
        ]
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    memories: list[Bytes] = [np.zeros(n, dtype=np.uint8) for n in lengths.values()]
    after, _ = records.apply([r for one in rounds for r in one], memories, PAGE, fresh=True)
    with directory_on_disk() as disk:
        (disk / "from").write_bytes(stream(rounds, lengths))
        report = convert(disk / "from", disk / "to", to=form)
        for name, expected in zip(lengths, after, strict=True):
            assert content(disk / "to", form, name) == expected.tobytes()
        full = sum(int(one.reshape(-1, PAGE).any(axis=1).sum()) for one in after)
        counted = (
            sum(block.data_pages for block in report.blocks)
            if isinstance(report, RawReport)
            else report.data_pages
        )
        assert counted == full


@few
@given(listed=record_lists([150, 7], PAGE))
def test_pages_are_counted_as_an_index_counts_them(listed: list[Record]) -> None:
    with directory_on_disk() as disk:
        (disk / "from").write_bytes(stream([listed], {"ram": PART, "rom": 7 * PAGE}))
        counts = []
        for pages in (False, True):
            with open_snapshot(disk / "from") as snapshot:
                if pages:
                    snapshot.prepare_random_reads()
                counts.append([block.data_pages for block in snapshot.blocks.values()])
        last = {(record.block, record.number): record.fill != 0 for record in listed}
        assert (
            counts
            == [[sum(data for (n, _), data in last.items() if n == block) for block in range(2)]]
            * 2
        )


@pytest.mark.parametrize("form", FORMS)
def test_page_may_change_more_often_than_an_index_can_tell(disk: Path, form: str) -> None:
    deltas = [Record(0, 3, delta=((k % PAGE, b"\x99"),)) for k in range(3000)]
    (disk / "from").write_bytes(stream([[page(3, 1)], deltas], {"ram": 10 * PAGE}))
    convert(disk / "from", disk / "to", to=form)
    assert content(disk / "to", form)[3 * PAGE : 4 * PAGE] == b"\x99" * 3000 + b"\1" * 1096


@pytest.mark.parametrize("form", FORMS)
def test_page_that_became_zero_leaves_nothing_in_the_file(disk: Path, form: str) -> None:
    other = PART // PAGE  # a page of another part
    rounds = [
        [page(k, 7) for k in range(64)],
        [page(other, 1)],
        [Record(0, k, fill=0) for k in range(64)],
    ]
    (disk / "from").write_bytes(stream(rounds, {"ram": 2 * PART}))
    convert(disk / "from", disk / "to", to=form)
    assert not any(content(disk / "to", form)[:PART])
    file = disk / "to" / "ram.raw" if form == "raw" else disk / "to"
    assert file.stat().st_blocks * 512 < 64 * PAGE


def test_dense_conversion_allocates_every_page(disk: Path) -> None:
    rounds = [[page(3, 1)], [Record(0, PART // PAGE, fill=0)]]
    (disk / "from").write_bytes(stream(rounds, {"ram": 3 * PART}))
    convert(disk / "from", disk / "to", to="mapped-ram", sparse="dense")
    assert content(disk / "to", "mapped-ram").count(1) == PAGE
    assert (disk / "to").stat().st_blocks * 512 >= 3 * PART


@pytest.mark.parametrize("form", FORMS)
def test_interrupted_pass_leaves_nothing(disk: Path, form: str) -> None:
    whole = stream([[page(k, 7) for k in range(512)]], {"ram": PART})
    pipe = disk / "from"
    os.mkfifo(pipe)
    interrupted = threading.Event()

    def write_half() -> None:
        with pipe.open("wb", buffering=0) as file:  # then the pass waits: it cannot end before
            file.write(whole[: len(whole) // 2])
            interrupted.wait(60)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write_half)
        with pytest.raises(KeyboardInterrupt):
            convert(pipe, disk / "to", to=form, progress=interrupt)
        interrupted.set()
        writer.result()
    assert [*disk.iterdir()] == [pipe]


@pytest.mark.parametrize("form", FORMS)
def test_stream_cut_within_its_pages_leaves_nothing(disk: Path, form: str) -> None:
    whole = stream([[page(k, 7) for k in range(64)]], {"ram": PART})
    (disk / "from").write_bytes(whole[: 30 * PAGE])
    with pytest.raises(SnapshotError):
        convert(disk / "from", disk / "to", to=form)
    assert [*disk.iterdir()] == [disk / "from"]


def test_content_elsewhere_is_asked_for(disk: Path) -> None:
    lengths = {"ram": 4 * PAGE, "shared": 3 * PAGE}
    (disk / "from").write_bytes(stream([[page(1, 7)]], lengths, shared=True))
    with pytest.raises(NotSupported, match="shared"):
        convert(disk / "from", disk / "to", to="mapped-ram")
    assert not (disk / "to").exists()
    memory = ram(3)
    convert(disk / "from", disk / "to", to="mapped-ram", memories={"shared": memory})
    assert content(disk / "to", "mapped-ram", "shared") == memory.tobytes()
    assert content(disk / "to", "mapped-ram")[PAGE] == 7


def test_content_elsewhere_has_no_raw_file(disk: Path) -> None:
    lengths = {"ram": 4 * PAGE, "shared": 3 * PAGE}
    (disk / "from").write_bytes(stream([[page(1, 7)]], lengths, shared=True))
    with open_snapshot(disk / "from") as snapshot:
        assert isinstance(snapshot, SequentialSnapshot)
        report = unpack(snapshot, disk / "out")
        assert [(b.file, b.data_pages, b.zero_pages) for b in report.blocks] == [
            ("ram.raw", 1, 3),
            (None, 0, 0),
        ]
        assert {path.name for path in (disk / "out").iterdir()} == {"ram.raw", "blocks.json"}
        unpack(snapshot, disk / "one", blocks=["ram"])
        with pytest.raises(UsageError, match="shared"):
            unpack(snapshot, disk / "two", blocks=["shared"])
    assert not (disk / "two").exists()


def test_guest_addresses_come_along(disk: Path) -> None:
    lengths = {"ram": 4 * PAGE, "shared": 3 * PAGE}
    (disk / "from").write_bytes(stream([[page(1, 7)]], lengths, shared=True))
    convert(disk / "from", disk / "to", to="stream")
    with open_snapshot(disk / "to") as snapshot:
        assert snapshot.stream.capabilities == ("x-ignore-shared",)
        assert [b.address for b in snapshot.blocks.values()] == [1 << 32, 2 << 32]
        assert [b.external for b in snapshot.blocks.values()] == [False, True]
