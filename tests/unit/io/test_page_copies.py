"""Pages written with digests, and copies of those that changed since."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import FileMemory, GuestMemoryError, open_snapshot, seal
from pyqmigrate._core import ffi
from pyqmigrate.errors import Cancelled
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.integrity.manifest import read_manifest, seal_path
from pyqmigrate.integrity.save_seal import SaveSeal
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.memory import Memory, OpenMemory, RamBlock
from pyqmigrate.io.page_copies import PageCopies
from pyqmigrate.io.page_digests import DigestTable
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.writer import SaveOptions, Sparse
from pyqmigrate.snapshot.stale import find_stale
from tests.harness.directories import directory_on_disk
from tests.harness.examples import few
from tests.harness.kernel import memfd
from tests.harness.processes import Holder

PAGE = 4096
NPAGES = (4 << 20) // PAGE + 70  # more than a chunk
PLENTY = 1 << 40
ZERO = xxhash.xxh3_128_digest(bytes(PAGE))


@dataclass
class Precopy:
    """A save that stops between its passes."""

    writer: Writer
    tables: list[DigestTable]
    copies: PageCopies

    def copy(self, room: int = PLENTY) -> bool:
        return self.copies.copy(self.writer.channels.sibling("copies"), room)

    def rewrite(self) -> None:
        self.writer.rewrite_pages(self.copies.copied, self.copies.memories)

    def assert_digests(self, *contents: bytes | bytearray) -> None:
        for table, content in zip(self.tables, contents, strict=True):
            for page in range(table.npages):
                expected = xxhash.xxh3_128_digest(content[page * PAGE : (page + 1) * PAGE])
                assert table[page] == expected, page


@contextlib.contextmanager
def begun(
    path: Path,
    memories: Sequence[Memory],
    *,
    sparse: Sparse = Sparse.AUTO,
    direct_io: DirectIO = DirectIO.AUTO,
    observer: SaveSeal | None = None,
) -> Iterator[Precopy]:
    """A save whose first pass is done."""
    blocks = [RamBlock(f"block{n}", memory) for n, memory in enumerate(memories)]
    writer = Writer(path, blocks, SaveOptions(sparse=sparse, direct_io=direct_io), observer)
    with contextlib.closing(writer):
        layouts = writer.head.blocks
        tables = [DigestTable(layout.num_pages) for layout in layouts]
        with PageCopies(writer.memories, layouts, tables) as copies:
            writer.begin()
            writer.write_pages(tables=tables)
            yield Precopy(writer, tables, copies)


def content_of(path: Path) -> list[bytes]:
    with open_snapshot(path) as snapshot:
        snapshot.verify()
        return [block.read(0, block.length) for block in snapshot.blocks.values()]


def speckled(npages: int = NPAGES) -> bytearray:
    """Data, with zero pages in it, alone and many."""
    memory = bytearray(os.urandom(npages * PAGE))
    for page in [*range(3, npages, 5), *range(npages // 2, npages // 2 + 300)]:
        memory[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    return memory


@pytest.mark.parametrize("direct_io", [DirectIO.AUTO, DirectIO.OFF])
@pytest.mark.parametrize("sparse", Sparse)
def test_digests_are_those_of_the_pages_as_written(
    sparse: Sparse, direct_io: DirectIO, disk: Path
) -> None:
    """Also of zero pages that are not written, and of the pages that share a file block with the end."""
    memories = speckled(), bytearray(3 * PAGE), bytearray(os.urandom(1024 * 4 * 5))
    with begun(disk / "s", memories, sparse=sparse, direct_io=direct_io) as precopy:
        precopy.assert_digests(*memories)
        assert precopy.copy()
        assert precopy.copies.copied_bytes == 0


@few
@given(
    changes=st.dictionaries(st.integers(0, NPAGES - 1), st.sampled_from(["data", "zero"])),
    later=st.dictionaries(st.integers(0, NPAGES - 1), st.sampled_from(["data", "zero", "back"])),
    sparse=st.sampled_from(Sparse),
    sealed=st.booleans(),
)
def test_file_has_the_memory_of_the_last_copy(
    changes: dict[int, str], later: dict[int, str], sparse: Sparse, sealed: bool
) -> None:
    """Pages that changed twice, back to what they were before (A, B, A), or to zero, too."""
    memory = speckled()
    first = bytes(memory)
    observer = SaveSeal(Algorithm.XXH3_128, 0, None) if sealed else None
    with directory_on_disk() as disk:
        with begun(disk / "s", [memory], sparse=sparse, observer=observer) as precopy:
            for round_of_changes in (changes, later):
                for page, kind in round_of_changes.items():
                    place = slice(page * PAGE, (page + 1) * PAGE)
                    fresh = {"data": os.urandom(PAGE), "zero": bytes(PAGE), "back": first[place]}
                    memory[place] = fresh[kind]
                assert precopy.copy()
                precopy.assert_digests(memory)
                precopy.rewrite()
            if sparse is Sparse.EXACT:
                precopy.writer.clean()
            precopy.writer.finish()
        assert content_of(disk / "s") == [memory]
        with open_snapshot(disk / "s") as snapshot:
            assert not find_stale(snapshot, Channels(1, "stale"))
        if observer is not None:
            assert_seal(observer, disk / "s")


def assert_seal(observer: SaveSeal, path: Path) -> None:
    manifest = observer.manifest(path.stat().st_mtime_ns)
    seal(path, algorithm=manifest.algorithm)
    made = read_manifest(seal_path(path))
    assert made is not None and made.digests == manifest.digests


def test_zero_pages_of_exact_saves_are_holes_after_they_became_zero(disk: Path) -> None:
    memory = bytearray(os.urandom(NPAGES * PAGE))
    with begun(disk / "s", [memory], sparse=Sparse.EXACT) as precopy:
        full = precopy.writer.target.allocated_bytes()
        memory[: 1 << 20] = bytes(1 << 20)
        precopy.copy()
        precopy.rewrite()
        precopy.writer.clean()
        assert precopy.writer.target.allocated_bytes() <= full - (1 << 20) + PAGE


def test_pages_without_room_keep_their_digests(disk: Path) -> None:
    memory = bytearray(os.urandom(NPAGES * PAGE))
    before = bytes(memory)
    with begun(disk / "s", [memory]) as precopy:
        memory[:] = os.urandom(len(memory))
        assert not precopy.copy(100 * PAGE)
        copies = precopy.copies
        assert copies.copied_bytes == 100 * PAGE
        copied = copies.copied[0]
        expected = bytearray(before)
        for page in range(NPAGES):
            if copied[page]:
                place = slice(page * PAGE, (page + 1) * PAGE)
                expected[place] = memory[place]
        precopy.assert_digests(expected)
        rest = copies.find_rest(precopy.writer.channels.sibling("rest"))
        assert [rest[0][page] for page in range(NPAGES)] == [
            not copied[page] for page in range(NPAGES)
        ]
        precopy.writer.rewrite_pages(rest)
        precopy.rewrite()
        precopy.writer.finish()
    assert content_of(disk / "s") == [memory]


def test_estimate_is_of_the_right_size(disk: Path) -> None:
    memory = bytearray(os.urandom(96 << 20))
    with begun(disk / "s", [memory, bytearray(PAGE)]) as precopy:
        channels = precopy.writer.channels.sibling("estimate")
        assert precopy.copies.estimate(channels) == 0
        memory[: 48 << 20] = bytes(48 << 20)
        assert 40 << 20 <= precopy.copies.estimate(channels) <= 56 << 20
        assert precopy.copy()
        assert precopy.copies.copied_bytes == 48 << 20


def test_copies_of_holes_take_no_memory(disk: Path) -> None:
    length = 64 << 20
    with memfd(length) as fd:
        os.pwrite(fd, os.urandom(length), 0)
        with begun(disk / "s", [FileMemory(fd)]) as precopy:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, length)
            assert precopy.copy()
            assert precopy.copies.copied_bytes == length
            assert anonymous_bytes(precopy.copies.memories[0]) < 1 << 20
            precopy.rewrite()
            precopy.writer.finish()
    assert content_of(disk / "s") == [bytes(length)]


def anonymous_bytes(memory: OpenMemory) -> int:
    """Bytes of this process' own in the mapping that ``memory`` is."""
    start = int(ffi.cast("uintptr_t", memory.core.base))
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        words = line.split()
        if "-" in words[0] and int(words[0].partition("-")[0], 16) == start:
            break
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def test_pages_of_a_running_guest_have_the_digests_of_their_copies(disk: Path) -> None:
    """Whatever is copied while memory changes: a last copy, with the memory still, makes it right."""
    memory = bytearray(os.urandom(4 << 20))
    ended = threading.Event()

    def guest() -> None:
        number = 0
        while not ended.is_set():
            number = (number + 7919) % len(memory)
            memory[number] = (memory[number] + 1) % 3
            page = number // PAGE * PAGE
            memory[page : page + PAGE] = memory[page : page + PAGE][::-1]

    writer = threading.Thread(target=guest)
    writer.start()
    try:
        with begun(disk / "s", [memory]) as precopy:
            for _ in range(5):
                precopy.copy()
                precopy.rewrite()
            ended.set()
            writer.join()
            precopy.copy()
            precopy.rewrite()
            precopy.writer.finish()
    finally:
        ended.set()
        writer.join()
    assert content_of(disk / "s") == [memory]


def test_pages_of_another_process_are_copied(disk: Path) -> None:
    with (
        Holder(512, range(0, 512, 3), flags=mmap.MAP_PRIVATE) as holder,
        begun(disk / "s", [holder.memory]) as precopy,
    ):
        assert precopy.copy()
        assert precopy.copies.copied_bytes == 0
        holder.end()
        with pytest.raises(GuestMemoryError):
            precopy.copy()


def test_memory_that_shrinks_is_an_error(disk: Path) -> None:
    with memfd(4 << 20) as fd, begun(disk / "s", [FileMemory(fd)]) as precopy:
        os.ftruncate(fd, 1 << 20)
        with pytest.raises(GuestMemoryError):
            precopy.copy()


def test_copy_is_cancelled_with_the_save(disk: Path) -> None:
    with begun(disk / "s", [bytearray(64 << 20)]) as precopy:
        channels = precopy.writer.channels.sibling("copies")
        precopy.writer.channels.cancel()
        with pytest.raises(Cancelled):
            precopy.copies.copy(channels, PLENTY)
