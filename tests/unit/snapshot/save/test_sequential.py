"""Sequential streams that we write: what they hold, and how they come to their names."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import (
    Cancelled,
    Descriptors,
    FileMemory,
    GuestMemoryError,
    RamBlock,
    TargetError,
    UsageError,
)
from pyqmigrate.format.stream.wire import SectionKind
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.load.sequential import (
    SequentialLoadReport,
    SequentialReader,
    start_sequential_load,
)
from pyqmigrate.snapshot.save.sequential import SequentialWriter, start_sequential_save
from tests.harness.examples import some
from tests.harness.kernel import guest, memfd
from tests.harness.snapshots import KNOWN, SLOW, Bytes, known_memory, ram
from tests.harness.strategies import page_bits

pytestmark = pytest.mark.usefixtures("same_descriptors")


def load(target: Target, **options: object) -> tuple[SequentialLoadReport, dict[str, Bytes]]:
    """Load all blocks into buffers that were not zero before."""
    source = StreamFile.open(target)
    try:
        reader = SequentialReader(source, {}, skip_unknown_blocks=True)
        lengths = {block.name: block.length for block in reader.blocks}
        reader.close()
        memories = {n: np.full(length, 0x77, dtype=np.uint8) for n, length in lengths.items()}
        return start_sequential_load(source, memories, **options).wait(), memories  # type: ignore[arg-type]
    finally:
        source.close()


def pages_of(*pages: int, npages: int) -> Bitmap:
    bitmap = Bitmap(npages)
    for page in pages:
        bitmap.core[page // 64] |= 1 << page % 64
    return bitmap


@some
@given(data=st.data(), page_size=st.sampled_from([1024, 4096, 65536]))
def test_memory_comes_back(tmp_path: Path, data: st.DataObject, page_size: int) -> None:
    memories = {
        name: guest(data.draw(page_bits(data.draw(st.integers(1, 200)))), page_size)
        for name in ("pc.ram", "ä", "x" * 255)[: data.draw(st.integers(1, 3))]
    }
    path = tmp_path / "guest.sequential"
    blocks = [RamBlock(name, memory, page_size) for name, memory in memories.items()]
    report = start_sequential_save(path, blocks).wait()
    loaded, got = load(path)
    assert loaded.stream.page_size == page_size
    for name, memory in memories.items():
        assert np.array_equal(got[name], memory)
    assert (loaded.data_pages, loaded.zero_pages) == (report.data_pages, report.zero_pages)
    assert report.bytes_written >= report.file_size == path.stat().st_size


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_sparse_memory_stays_sparse_and_comes_back(tmp_path: Path, sealed: bool) -> None:
    length = 64 << 20
    path = tmp_path / "guest.sequential"
    with memfd(length, fcntl.F_SEAL_SHRINK if sealed else 0) as fd, memfd(length) as out:
        for at in (0, 4096 * 777, length - 4096):
            os.pwrite(fd, os.urandom(4096), at)
        os.pwrite(out, b"old", 1 << 20)
        blocks = os.fstat(fd).st_blocks
        report = start_sequential_save(path, [RamBlock("ram", FileMemory(fd))]).wait()
        assert os.fstat(fd).st_blocks == blocks
        assert (report.data_pages, report.zero_pages) == (3, length // 4096 - 3)
        source = StreamFile.open(path)
        start_sequential_load(source, {"ram": FileMemory(out)}).wait()
        source.close()
        assert os.fstat(out).st_blocks == blocks
        assert os.pread(out, length, 0) == os.pread(fd, length, 0)


def test_rewritten_pages_are_those_of_the_last_pass(tmp_path: Path) -> None:
    memory = known_memory()
    path = tmp_path / "guest.sequential"
    writer = SequentialWriter(path, [RamBlock("ram", memory)])
    writer.begin()
    writer.write_pages()
    data = int(np.flatnonzero(memory.reshape(-1, 4096).any(axis=1))[0])
    zero = int(np.flatnonzero(~memory.reshape(-1, 4096).any(axis=1))[0])
    memory.reshape(-1, 4096)[data] = 0
    memory.reshape(-1, 4096)[zero] = 9
    before = memory.copy()
    untold = (data + 100) % KNOWN
    memory.reshape(-1, 4096)[untold] = 0xAB  # not selected: as it was in the first pass
    writer.write_pages([pages_of(data, zero, npages=KNOWN)])
    assert writer.clean() == 0
    report = writer.finish()
    writer.close()
    _, got = load(path)
    assert np.array_equal(got["ram"], before)
    first = int(before.reshape(-1, 4096).any(axis=1).sum())
    assert report.data_pages + report.zero_pages == KNOWN + 2
    assert abs(report.data_pages - first) <= 1


def test_each_pass_is_a_part_and_an_empty_one_is_none(tmp_path: Path) -> None:
    path = tmp_path / "guest.sequential"
    writer = SequentialWriter(path, [RamBlock("ram", known_memory())])
    writer.begin()
    writer.write_pages()
    writer.write_pages([pages_of(npages=KNOWN)])
    writer.write_pages([pages_of(3, npages=KNOWN)])
    writer.finish(switchover_start=True)
    writer.close()
    report, _ = load(path)
    assert [section.kind for section in report.stream.sections] == [
        SectionKind.START,
        SectionKind.PART,
        SectionKind.PART,
        SectionKind.COMMAND,
        SectionKind.END,
    ]


def test_stream_without_a_pass_is_loaded_as_zeros(tmp_path: Path) -> None:
    writer = SequentialWriter(tmp_path / "guest.sequential", [RamBlock("ram", known_memory())])
    writer.begin()
    writer.finish()
    writer.close()
    report, got = load(tmp_path / "guest.sequential")
    assert not got["ram"].any()
    assert report.zero_pages == KNOWN


@pytest.mark.parametrize("offset", [1, 4096, 12345])
def test_bytes_before_the_offset_are_kept(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "guest.sequential"
    path.write_bytes(b"h" * offset + b"older" * 1000)
    memory = known_memory()
    uri = f"file:{path},offset={offset}"
    start_sequential_save(uri, [RamBlock("ram", memory)]).wait()
    assert path.read_bytes()[: offset + 4] == b"h" * offset + b"QEVM"
    _, got = load(uri)
    assert np.array_equal(got["ram"], memory)


def test_descriptor_is_written_and_read_where_it_says(tmp_path: Path) -> None:
    memory = known_memory()
    fd = os.open(tmp_path / "guest.sequential", os.O_RDWR | os.O_CREAT)
    try:
        start_sequential_save(Descriptors(fd, offset=99), [RamBlock("ram", memory)]).wait()
        _, got = load(Descriptors(fd, offset=99))
        assert np.array_equal(got["ram"], memory)
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    finally:
        os.close(fd)


def test_reused_file_ends_with_the_new_stream(tmp_path: Path) -> None:
    path = tmp_path / "guest.sequential"
    start_sequential_save(path, [RamBlock("ram", ram(2000))]).wait()
    memory = known_memory()
    report = start_sequential_save(path, [RamBlock("ram", memory)], reuse=True).wait()
    assert path.stat().st_size == report.file_size
    loaded, got = load(path)
    assert loaded.stream.end == report.file_size
    assert np.array_equal(got["ram"], memory)


def test_unfinished_file_has_no_name(tmp_path: Path) -> None:
    writer = SequentialWriter(tmp_path / "guest.sequential", [RamBlock("ram", known_memory())])
    writer.begin()
    writer.write_pages()
    assert list(tmp_path.iterdir()) == []
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_unfinished_file_in_place_has_no_magic(tmp_path: Path) -> None:
    path = tmp_path / "guest.sequential"
    writer = SequentialWriter(f"file:{path},offset=1", [RamBlock("ram", ram(2000, density=1))])
    writer.begin()
    writer.write_pages()
    writer.close()
    assert path.stat().st_size > 1 << 20
    assert path.read_bytes()[:5] == bytes(5)


def test_cancelled_save_leaves_nothing(tmp_path: Path) -> None:
    job = start_sequential_save(
        tmp_path / "guest.sequential", [RamBlock("ram", ram(2000, density=1))], max_bandwidth=SLOW
    )
    time.sleep(0.2)
    started = time.monotonic()
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(5)
    assert time.monotonic() - started < 1
    assert list(tmp_path.iterdir()) == []


def test_bandwidth_limit_is_kept_and_may_be_lifted(tmp_path: Path) -> None:
    memory = ram(2000, density=1)
    job = start_sequential_save(
        tmp_path / "guest.sequential", [RamBlock("ram", memory)], max_bandwidth=SLOW
    )
    time.sleep(0.5)
    moved = job.progress.bytes_moved
    assert moved < 2 * SLOW
    job.set_max_bandwidth(0)
    assert job.result(20).bytes_written > len(memory)


def test_memory_that_shrinks_is_an_error_of_its_block(tmp_path: Path) -> None:
    with memfd(16 << 20) as fd:
        writer = SequentialWriter(tmp_path / "guest.sequential", [RamBlock("ram", FileMemory(fd))])
        os.ftruncate(fd, 4 << 20)
        with pytest.raises(GuestMemoryError) as caught:
            writer.run()
        assert caught.value.block == "ram"


def test_no_block_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        SequentialWriter(tmp_path / "guest.sequential", [])


def test_refused_write_is_an_error_with_number_and_position(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, before[1]))
    try:
        with pytest.raises(TargetError) as caught:
            start_sequential_save(tmp_path / "x", [RamBlock("ram", ram(4000, density=1))]).wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.position is not None
