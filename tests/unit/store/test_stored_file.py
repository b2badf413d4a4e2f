"""A stored snapshot shown as a file: its bytes, its holes, and what is damaged."""

from __future__ import annotations

import errno
import os
import random
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.errors import TargetError, UsageError
from pyqmigrate.format.store.config import PAGE
from pyqmigrate.format.store.keys import pack_key, snapshot_key
from pyqmigrate.format.store.pack import BasePage, PackFooter
from pyqmigrate.format.store.snapshot import PageRuns, StoredSnapshot
from pyqmigrate.store import frames
from pyqmigrate.store.damage import DamagedPack
from pyqmigrate.store.frames import Frames
from pyqmigrate.store.packs import Packs
from pyqmigrate.store.store import Store
from pyqmigrate.store.stored_file import StoredFile
from tests.harness.stores import Added, image, put_pack, put_snapshot

SIZE = 700 * PAGE + 1234
CONTENT = bytearray(image(701, seed=1, size=SIZE))
CONTENT[5 * PAGE + 100 : 5 * PAGE + 200] = b"e" * 100
EXTENTS = [(0, 300), (5 * PAGE + 100, 100), (300 * PAGE - 50, 100), (700 * PAGE, 1234)]
for at, length in EXTENTS:  # bytes in extents are not those of the pages below
    CONTENT[at : at + length] = bytes(random.Random(at).randbytes(length))
CONTENT = bytes(CONTENT)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "store") as found:
        yield found


@pytest.fixture
def file(store: Store) -> Iterator[StoredFile]:
    put_snapshot(
        store, "a", CONTENT, extents=EXTENTS, frame_pages=7, pack_pages=100,
        companions={".vm.json": b"{}"},
    )  # fmt: skip
    with store.open_file("a") as found:
        yield found


def pack_file(store: Store, n: int = 0) -> Path:
    assert store.place.directory is not None
    return sorted((store.place.directory / "packs").iterdir())[n]


def test_the_whole_file_is_read(file: StoredFile) -> None:
    assert file.size == SIZE
    assert bytes(file.read(0, SIZE)) == CONTENT


def test_any_range_is_read(file: StoredFile) -> None:
    rng = random.Random(3)
    for _ in range(400):
        offset = rng.randrange(SIZE)
        length = rng.choice([1, 100, PAGE, rng.randrange(1, 40 * PAGE)])
        assert bytes(file.read(offset, length)) == CONTENT[offset : offset + length]
        assert b"".join(file.views(offset, length)) == CONTENT[offset : offset + length]
        pages = (offset // PAGE * PAGE, length // PAGE * PAGE)
        assert b"".join(file.views(*pages)) == CONTENT[pages[0] : sum(pages)]


def test_long_runs_of_one_word_are_read(store: Store) -> None:
    content = b"".join(
        bytes([n % 3]) * (n * PAGE) + random.Random(n).randbytes(PAGE) for n in range(70)
    )
    put_snapshot(store, "a", content)
    with store.open_file("a") as file:
        assert bytes(file.read(0, len(content))) == content
        assert bytes(file.read(100 * PAGE + 5, 99 * PAGE)) == content[100 * PAGE + 5 :][: 99 * PAGE]


def test_the_bytes_around_a_read_need_no_other_read(store: Store, file: StoredFile) -> None:
    for page in range(0, 701, 3):
        offset = page * PAGE
        file.read(offset, PAGE)
        before = store.packs.requests
        start, end = file.cheap_range(offset, PAGE)
        assert start % PAGE == 0
        assert end in (SIZE, end // PAGE * PAGE)
        assert start <= offset < min(offset + PAGE, SIZE) <= end
        assert bytes(file.read(start, end - start)) == CONTENT[start:end]
        assert store.packs.requests == before


def test_the_bytes_around_a_read_end_where_the_next_frame_begins(store: Store) -> None:
    pages = random.Random(5).randbytes(300 * PAGE)
    put_snapshot(store, "a", pages, frame_pages=10)
    with store.open_file("a") as file:
        file.read(154 * PAGE, PAGE)
        assert file.cheap_range(154 * PAGE, PAGE) == (150 * PAGE, 160 * PAGE)
        file.read(0, len(pages))
        assert file.cheap_range(154 * PAGE, PAGE) == (90 * PAGE, 219 * PAGE)


def test_a_read_beyond_the_end_is_empty(file: StoredFile) -> None:
    assert bytes(file.read(SIZE, 10)) == b""
    assert bytes(file.read(SIZE + PAGE, 10)) == b""
    assert bytes(file.read(SIZE - 3, 10)) == CONTENT[-3:]
    assert bytes(file.read(10, 0)) == b""


def test_holes_are_the_zero_pages(file: StoredFile) -> None:
    zero = [not any(CONTENT[at : at + PAGE]) for at in range(0, SIZE, PAGE)]
    assert any(zero)
    for page, is_zero in enumerate(zero):
        offset = page * PAGE + 17 if (page + 1) * PAGE < SIZE else page * PAGE
        data, hole = file.next_data(offset), file.next_hole(offset)
        later = next((n for n in range(page, len(zero)) if not zero[n]), None)
        expected = None if later is None else max(offset, later * PAGE)
        assert data == expected
        after = next((n for n in range(page, len(zero)) if zero[n]), len(zero))
        assert hole == min(max(offset, after * PAGE), SIZE)
        assert (data == offset) == (not is_zero)


def test_after_the_last_data_there_is_none(store: Store) -> None:
    put_snapshot(store, "a", image(3, seed=1) + bytes(10 * PAGE))
    with store.open_file("a") as file:
        assert file.next_data(5 * PAGE) is None
        assert file.next_hole(5 * PAGE) == 5 * PAGE
        assert file.next_data(13 * PAGE) is None


def test_an_empty_file_has_nothing(store: Store) -> None:
    put_snapshot(store, "a", b"")
    with store.open_file("a") as file:
        assert bytes(file.read(0, 10)) == b""
        assert file.next_data(0) is None
        assert list(file.data_ranges()) == []


def test_the_ranges_of_data_are_all_that_is_not_zero(file: StoredFile) -> None:
    shown = bytearray(SIZE)
    for offset, length in file.data_ranges():
        shown[offset : offset + length] = file.read(offset, length)
    assert shown == CONTENT


def test_time_seal_and_companions_are_shown(store: Store, file: StoredFile) -> None:
    assert file.mtime_ns == 1_700_000_000_123_456_789
    assert dict(file.companions) == {".seal": b"the seal", ".vm.json": b"{}"}
    store.write_working_set("a", b"first")
    store.write_working_set("a", b"second")
    with store.open_file("a") as again:
        assert again.companions[".workingset"] == b"second"


def test_pages_of_another_snapshot_are_found_in_its_packs(store: Store) -> None:
    added = Added()
    put_snapshot(store, "a", image(100, seed=1), added=added)
    before = len(list(store.place.list("packs/")))
    mixed = image(50, seed=1) + image(20, seed=2) + image(30, seed=1)
    put_snapshot(store, "b", mixed, added=added)
    assert len(list(store.place.list("packs/"))) == before + 1
    with store.open_file("b") as file:
        assert bytes(file.read(0, len(mixed))) == mixed


def with_xor(store: Store, snapshot: str = "x", *, chain: bool = False) -> bytes:
    """Store ten pages, each XORed with a page of another pack, but one that has no base."""
    rng = random.Random(8)
    old = [rng.randbytes(PAGE) for _ in range(12)]
    base = put_pack(store, old, frame_pages=5)
    new = [bytearray(page) for page in old[1:11]]
    for page in new:
        page[7] ^= 0xFF
    pages = [bytes(page) for page in new]
    known = {BasePage(base, n): page for n, page in enumerate(old)}
    bases = {n: BasePage(base, n + 1) for n in range(10) if n != 4}
    pack = put_pack(store, pages, bases, known, frame_pages=4)
    packs = (base, pack)
    if chain:  # a base in an XOR frame
        known = {BasePage(pack, n): page for n, page in enumerate(pages)}
        pages = [bytes(PAGE - 1) + b"1"] * 10
        last = put_pack(store, pages, {n: BasePage(pack, n) for n in range(10)}, known)
        packs = (base, pack, last)
    empty = put_snapshot(store, "empty", b"")
    document = StoredSnapshot(
        head=empty.head.__class__(
            snapshot, 10 * PAGE, 1, "", None, 1, None, "mapped-ram"
        ),
        packs=packs,
        extents=(),
        runs=PageRuns(array("Q", [0]), array("I", [10]), array("I", [len(packs) - 1]), array("I", [0])),
        fills=empty.fills,
        seal=b"",
    )  # fmt: skip
    store.place.write_new(snapshot_key(snapshot), document.encode(store.config.key))
    return b"".join(pages)


def test_pages_that_are_stored_as_a_difference_are_whole(store: Store) -> None:
    expected = with_xor(store)
    with store.open_file("x") as file:
        assert bytes(file.read(0, len(expected))) == expected
        assert bytes(file.read(4 * PAGE, PAGE)) == expected[4 * PAGE : 5 * PAGE]


def test_a_base_that_is_itself_a_difference_is_refused(store: Store) -> None:
    with_xor(store, chain=True)
    with store.open_file("x") as file, pytest.raises(DamagedPack, match="is not a plain page"):
        file.read(0, PAGE)


@pytest.mark.parametrize("n", range(5))
def test_a_flipped_bit_is_eio_with_its_place_and_never_a_wrong_page(store: Store, n: int) -> None:
    put_snapshot(store, "a", CONTENT, extents=EXTENTS, frame_pages=7)
    path = pack_file(store)
    data = bytearray(path.read_bytes())
    rng = random.Random(n)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    damaged = 0
    with store.open_file("a") as file:
        for offset in range(0, SIZE, PAGE):
            try:
                assert bytes(file.read(offset, PAGE)) == CONTENT[offset : offset + PAGE]
            except DamagedPack as error:
                damaged += 1
                assert error.errno == errno.EIO
                assert error.snapshot == "a"
                assert error.pack.hex() == path.stem
                assert f"snapshot 'a': pack {path.stem}" in str(error)
    # Nothing but the magic at the start has no digest of its own, and verify finds that.
    assert damaged or data[:8] != b"qmpack1\n"


def test_a_page_that_is_exchanged_with_another_is_found(store: Store) -> None:
    pages = [random.Random(n).randbytes(PAGE) for n in range(4)]
    put_snapshot(store, "a", b"".join(pages), frame_pages=1)
    path = pack_file(store)
    data = path.read_bytes()
    footer = PackFooter.decode(store.config.key, data, len(data), "x")
    first, second = footer.frame(0), footer.frame(1)
    assert first.length == second.length
    middle = first.offset + first.length
    end = middle + second.length
    path.write_bytes(
        data[: first.offset] + data[middle:end] + data[first.offset : middle] + data[end:]
    )
    with store.open_file("a") as file:
        with pytest.raises(DamagedPack) as error:
            file.read(PAGE, 1)
        assert (error.value.frame, error.value.page) == (1, 1)
        assert bytes(file.read(2 * PAGE, PAGE)) == pages[2]


def test_a_missing_pack_is_named(store: Store) -> None:
    put_snapshot(store, "a", image(10, seed=1))
    pack_file(store).unlink()
    with store.open_file("a") as file, pytest.raises(DamagedPack, match="it is missing"):
        file.read(0, 10 * PAGE)


def test_a_page_that_its_pack_does_not_have_is_named(store: Store) -> None:
    document = put_snapshot(store, "a", image(10, seed=1))
    runs = document.runs
    wrong = PageRuns(runs.firsts, runs.counts, runs.packs, array("I", [999] * len(runs)))
    head = document.head.__class__("b", document.head.size, 1, "", None, 1, None, "mapped-ram")
    other = StoredSnapshot(head, document.packs, (), wrong, document.fills, b"")
    store.place.write_new(snapshot_key("b"), other.encode(store.config.key))
    with store.open_file("b") as file, pytest.raises(DamagedPack, match="needs page 999"):
        file.read(0, 10 * PAGE)


def test_many_threads_read_and_each_frame_is_decompressed_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_snapshot(store, "a", CONTENT, extents=EXTENTS, frame_pages=7, pack_pages=100)
    read: list[int] = []
    real = Packs.frames

    def counted(self: Packs, pack: bytes, frames: list, **more: bool) -> list:  # type: ignore[type-arg]
        read.extend((pack, frame.number) for frame in frames)  # type: ignore[misc]
        return real(self, pack, frames, **more)

    monkeypatch.setattr(Packs, "frames", counted)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(100):
            offset = rng.randrange(SIZE)
            if bytes(file.read(offset, 5 * PAGE)) != CONTENT[offset : offset + 5 * PAGE]:
                wrong.append(offset)

    with store.open_file("a") as file:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(read) == len(set(read))


def test_frames_that_are_xored_with_each_others_packs_do_not_block(store: Store) -> None:
    """Two packs, each with plain and XOR frames whose bases are in the other."""
    rng = random.Random(1)
    plain = [rng.randbytes(PAGE) for _ in range(8)]
    left = put_pack(store, plain[:4], frame_pages=1)
    right = put_pack(store, plain[4:], frame_pages=1)
    known = {BasePage(left, n): plain[n] for n in range(4)}
    known |= {BasePage(right, n): plain[4 + n] for n in range(4)}
    changed = [bytes([page[0] ^ 1]) + page[1:] for page in plain]
    order = {n: BasePage(right, n) if n < 4 else BasePage(left, n - 4) for n in range(8)}
    pages = [changed[4 + n] if n < 4 else changed[n - 4] for n in range(8)]
    mixed = put_pack(store, pages, order, known, frame_pages=1)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        frames = [(pack, n) for pack in (left, right) for n in range(4)]
        frames += [(mixed, n) for n in range(8)]
        random.Random(seed).shuffle(frames)
        try:
            found = kept.load(frames[:9])
            assert all(len(content) == PAGE for content in found.values())
        except BaseException as error:
            errors.append(error)

    for seed in range(20):
        kept = Frames(store.packs, limit=PAGE)
        threads = [threading.Thread(target=work, args=(seed * 10 + n,)) for n in range(4)]
        for thread in threads:
            thread.daemon = True
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    assert not errors


def test_kept_frames_are_bounded(store: Store) -> None:
    put_snapshot(store, "a", image(600, seed=2), frame_pages=8)
    store.frames._limit = 20 * 8 * PAGE
    with store.open_file("a") as file:
        file.read(0, 600 * PAGE)
    assert 0 < store.frames._kept_bytes <= 20 * 8 * PAGE
    assert store.frames._kept_bytes == sum(map(len, store.frames._kept.values()))


@pytest.mark.parametrize("room", [True, False])
def test_reader_that_is_alone_has_frames_decompressed_by_two_threads(
    store: Store, file: StoredFile, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    threads: set[int] = set()
    together = threading.Barrier(2, timeout=10)
    read_span = store.frames._read_span

    def met(span: Any, *, demand: bool) -> Any:
        if room and threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            together.wait()
        return read_span(span, demand=demand)

    monkeypatch.setattr(frames, "_PROCESSORS", 2)
    monkeypatch.setattr(store.frames, "_read_span", met)
    if not room:
        monkeypatch.setattr(store.frames._executor(), "submit", refuse)
    assert bytes(file.read(0, 90 * PAGE)) == CONTENT[: 90 * PAGE]
    assert len(threads) == 2 * room


def test_prefetching_reads_every_frame_once_and_tells_when_ranges_are_ready(
    store: Store, file: StoredFile
) -> None:
    ranges = [(0, 100 * PAGE), (50 * PAGE, 100 * PAGE), (600 * PAGE, 200 * PAGE), (3 * PAGE, 1)]
    ready: list[tuple[int, int]] = []
    count = file.prefetch(ranges, done=lambda *found: ready.append(found))
    assert sorted(ready) == sorted(ranges)
    assert count == len(list(file.frames_of(ranges)))
    before = store.packs.requests
    assert bytes(file.read(0, 150 * PAGE)) == CONTENT[: 150 * PAGE]
    assert store.packs.requests == before
    assert file.prefetch([(0, SIZE)], stop=stopped()) == 0


def stopped() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def test_prefetching_waits_while_a_reader_does(store: Store, file: StoredFile) -> None:
    file.read(0, PAGE)
    store.frames._demands = 1
    thread = threading.Thread(target=file.prefetch, args=([(0, SIZE)],))
    thread.start()
    before = store.packs.requests
    thread.join(0.2)
    assert thread.is_alive()
    assert store.packs.requests == before
    store.frames._demands = 0
    thread.join(10)
    assert not thread.is_alive()
    assert store.packs.requests > before


def test_prefetching_raises_the_error_of_a_damaged_pack(store: Store) -> None:
    put_snapshot(store, "a", image(100, seed=2), frame_pages=8, pack_pages=20)
    pack_file(store, 1).unlink()
    with store.open_file("a") as file, pytest.raises(DamagedPack, match="snapshot 'a'"):
        file.prefetch([(0, 100 * PAGE)])


def test_a_name_that_is_not_there_is_a_usage_error(store: Store) -> None:
    for call in (store.open_file, store.head, store.read_snapshot):
        with pytest.raises(UsageError, match="no snapshot 'nobody'"):
            call("nobody")
        with pytest.raises(UsageError, match="cannot be the name"):
            call("../a")


def test_a_document_that_is_a_link_is_refused(store: Store, tmp_path: Path) -> None:
    put_snapshot(store, "a", image(3))
    assert store.place.directory is not None
    (store.place.directory / "snapshots" / "b.snap").symlink_to("a.snap")
    with pytest.raises(TargetError) as error:
        store.open_file("b")
    assert error.value.errno == errno.ELOOP


@pytest.mark.usefixtures("same_descriptors")
def test_closing_leaves_no_descriptor(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s") as store:
        put_snapshot(store, "a", image(3))
        file = store.open_file("a")
        file.read(0, PAGE)
        file.close()
        file.close()
    assert os.listdir(tmp_path / "s" / "packs")
    assert pack_key(bytes(16)).startswith("packs/")
