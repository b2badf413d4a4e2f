"""The small stream for a QEMU whose memory is mapped from the snapshot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyqmigrate
from pyqmigrate.errors import Cancelled
from pyqmigrate.vm.incoming.incoming_stream import IncomingStream
from tests.harness.directories import directory_on_disk
from tests.harness.examples import some
from tests.harness.snapshots import Bytes, data_bytes, ram

PAGE = 4096
PAGES = 1100  # of the big block: more than one chunk, and not a multiple of it


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with directory_on_disk() as found:
        yield found


@dataclass
class Made:
    """A snapshot with blocks ``big`` and ``small``, and the stream that maps ``mapped``."""

    path: Path
    offset: int
    big: Bytes
    small: Bytes

    def dirty(self, pages: list[int]) -> list[int]:
        """Write old bytes under the clear bits among ``pages``; return the pages with clear bits."""
        with pyqmigrate.open_snapshot(self.path, offset=self.offset) as snapshot:
            block = snapshot.blocks["big"]
            clear = [page for page in pages if not block.bitmap[page]]
            with self.path.open("r+b") as file:
                for page in clear:
                    file.seek(block.pages_offset + page * PAGE + page % PAGE)
                    file.write(b"\1")
        return clear

    def stream(self, *mapped: str) -> IncomingStream:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            with pyqmigrate.open_snapshot(self.path, offset=self.offset) as snapshot:
                made = IncomingStream(snapshot, fd, mapped)
                made.build()
                return made
        finally:
            os.close(fd)

    def bits(self, made: IncomingStream, name: str) -> list[int]:
        """Return the pages whose bits are set in the stream."""
        target = pyqmigrate.Descriptors(made.fd, offset=self.offset)
        with pyqmigrate.open_snapshot(target) as snapshot:
            bitmap = snapshot.blocks[name].bitmap
            return [page for page in range(len(bitmap)) if bitmap[page]]


def make(directory: Path, *, offset: int = 0, density: float = 0.5) -> Made:
    path = directory / "guest.mapped"
    path.unlink(missing_ok=True)
    big, small = ram(PAGES, density=density), ram(20, seed=1)
    pyqmigrate.save(
        f"file:{path},offset={offset}",
        [pyqmigrate.RamBlock("big", big), pyqmigrate.RamBlock("small", small)],
        machine="pc-q35-10.0",
    )
    return Made(path, offset, big, small)


@pytest.mark.parametrize("offset", [0, 5000, 1 << 20])
def test_stream_is_a_whole_stream_at_the_same_place(directory: Path, offset: int) -> None:
    made = make(directory, offset=offset)
    stream = made.stream("big")
    with (
        pyqmigrate.open_snapshot(made.path, offset=offset) as snapshot,
        pyqmigrate.open_snapshot(pyqmigrate.Descriptors(stream.fd, offset=offset)) as copy,
    ):
        copy.verify()
        assert copy.stream == snapshot.stream
    stream.close()


def test_mapped_block_is_all_clear_and_all_hole(directory: Path) -> None:
    made = make(directory)
    stream = made.stream("big")
    assert made.bits(stream, "big") == []
    with pyqmigrate.open_snapshot(pyqmigrate.Descriptors(stream.fd)) as copy:
        block = copy.blocks["big"]
        path = Path(f"/proc/self/fd/{stream.fd}")
        assert data_bytes(path, block.pages_offset, block.pages_offset + block.length) == 0
    assert stream.stale_pages == 0
    stream.close()


def test_other_blocks_are_carried_along(directory: Path) -> None:
    made = make(directory)
    stream = made.stream("big")
    with pyqmigrate.open_snapshot(pyqmigrate.Descriptors(stream.fd)) as copy:
        small = copy.blocks["small"]
        assert small.read(0, small.length) == made.small.tobytes()
    stream.close()


@some
@given(st.lists(st.integers(0, PAGES - 1), max_size=60), st.sampled_from([0.0, 0.02, 0.5, 0.98]))
def test_exactly_the_stale_pages_are_marked(
    directory: Path, pages: list[int], density: float
) -> None:
    made = make(directory, density=density)
    stale = sorted(set(made.dirty(pages)))
    stream = made.stream("big")
    assert made.bits(stream, "big") == stale
    assert stream.stale_pages == len(stale)
    stream.close()


def test_stale_pages_read_as_zeros_in_the_stream(directory: Path) -> None:
    made = make(directory)
    stale = made.dirty(list(range(PAGES)))
    assert stale, "no page is clear: the test proves nothing"
    stream = made.stream("big")
    with pyqmigrate.open_snapshot(pyqmigrate.Descriptors(stream.fd)) as copy:
        block = copy.blocks["big"]
        assert block.read(0, block.length) == bytes(block.length)
    stream.close()


def test_snapshot_is_not_changed(directory: Path) -> None:
    made = make(directory)
    made.dirty(list(range(0, PAGES, 7)))
    before = made.path.read_bytes()
    made.stream("big").close()
    assert made.path.read_bytes() == before


def test_zero_pages_that_were_written_are_not_stale(directory: Path) -> None:
    """Short gaps are written along with their neighbours: bytes under clear bits, all zero."""
    path = directory / "bridged.mapped"
    memory = np.zeros(2000 * PAGE, dtype=np.uint8)
    memory[:: 2 * PAGE] = 1
    pyqmigrate.save(path, [pyqmigrate.RamBlock("big", memory)], sparse="dense")
    stream = Made(path, 0, memory, memory).stream("big")
    assert stream.stale_pages == 0
    stream.close()


def test_readers_have_positions_of_their_own(directory: Path) -> None:
    stream = make(directory).stream("big")
    first, second = stream.open_for_reading(), stream.open_for_reading()
    stream.close()
    assert os.read(first, 4) == os.read(second, 4) == b"QEVM"
    os.close(first)
    os.close(second)


def test_cancelled_search_ends(directory: Path) -> None:
    made = make(directory)
    fd = os.open(made.path, os.O_RDONLY)
    with pyqmigrate.open_snapshot(made.path) as snapshot:
        stream = IncomingStream(snapshot, fd, ["big"])
        stream.cancel()
        with pytest.raises(Cancelled):
            stream.build()
    stream.close()
    os.close(fd)


def test_sealed_snapshot_is_not_searched(directory: Path) -> None:
    made = make(directory)
    assert made.dirty(list(range(PAGES)))
    fd = os.open(made.path, os.O_RDONLY)
    with pyqmigrate.open_snapshot(made.path) as snapshot:
        stream = IncomingStream(snapshot, fd, ["big"], sealed=True)
        stream.build()
    os.close(fd)
    assert (stream.stale_pages, made.bits(stream, "big")) == (0, [])
    stream.close()
