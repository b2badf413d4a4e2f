"""Damage in a store is found, and named with the snapshots that it hits."""

from __future__ import annotations

import errno
import random
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyqmigrate.errors import TargetError
from pyqmigrate.format.store.config import PAGE
from pyqmigrate.format.store.keys import snapshot_key
from pyqmigrate.format.store.pack import BasePage, PackFooter
from pyqmigrate.format.store.snapshot import PageRuns, StoredSnapshot
from pyqmigrate.store.store import NoSnapshot, Store
from pyqmigrate.store.verifying import VerifyReport, verify
from tests.harness.stores import Added, put_pack, put_snapshot

PAGES = [random.Random(n).randbytes(PAGE) for n in range(60)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Snapshot a has the pages 0 to 39 of one pack, b 30 to 39 of it and 20 of another, c none."""
    with Store.create(tmp_path / "store") as found:
        added = Added()
        put_snapshot(found, "a", b"".join(PAGES[:40]), added=added, frame_pages=5)
        put_snapshot(found, "b", b"".join(PAGES[30:]), added=added, frame_pages=5)
        put_snapshot(found, "c", bytes(10 * PAGE), added=added)
        yield found


def folder(store: Store, name: str) -> Path:
    assert store.place.directory is not None
    return store.place.directory / name


def pack_of(store: Store, name: str, n: int = 0) -> Path:
    return folder(store, "packs") / f"{store.read_snapshot(name).packs[n].hex()}.pack"


def footer_of(store: Store, path: Path) -> PackFooter:
    data = path.read_bytes()
    return PackFooter.decode(store.config.key, data, len(data), "x")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def damages(report: VerifyReport) -> list[tuple[int | None, int | None, tuple[str, ...]]]:
    assert not report.intact
    assert report.damage_count == len(report.damages)
    return [(damage.frame, damage.page, damage.names) for damage in report.damages]


@pytest.mark.parametrize("channels", [1, 4])
def test_an_intact_store_is_intact(store: Store, channels: int) -> None:
    report = verify(store, channels=channels)
    assert report.intact
    assert (report.snapshot_count, report.packs, report.unneeded_packs) == (3, 2, 0)
    sizes = sum(path.stat().st_size for path in folder(store, "packs").iterdir())
    assert report.bytes_read == sizes


def test_a_damaged_frame_is_named_with_the_snapshots_that_have_its_pages(store: Store) -> None:
    path = pack_of(store, "a")
    footer = footer_of(store, path)
    flip(path, footer.frame(1).offset + 20)  # pages 5 to 9: a alone
    ((frame, page, names),) = damages(verify(store))
    assert (frame, names) == (1, ("a",))
    assert page is not None
    assert 5 <= page < 10
    flip(path, footer.frame(1).offset + 20)
    flip(path, footer.frame(7).offset + 20)  # pages 35 to 39: both
    ((frame, page, names),) = damages(verify(store))
    assert (frame, names) == (7, ("a", "b"))
    (damage,) = verify(store).damages
    assert str(damage).startswith(f"pack {path.stem}, frame 7, page 3")
    assert str(damage).endswith("(a, b)")


def test_a_damaged_footer_hits_all_snapshots_of_the_pack(store: Store) -> None:
    path = pack_of(store, "a")
    flip(path, path.stat().st_size - 100)
    assert damages(verify(store)) == [(None, None, ("a", "b"))]


def test_a_damaged_start_is_found(store: Store) -> None:
    path = pack_of(store, "a")
    flip(path, 2)
    report = verify(store)
    assert damages(report) == [(None, None, ("a", "b"))]
    assert "first bytes" in report.damages[0].why


@pytest.mark.parametrize("how", ["missing", "empty", "short", "long"])
def test_a_pack_that_is_not_whole_is_named(store: Store, how: str) -> None:
    path = pack_of(store, "b", 1)
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        size = {"empty": 0, "short": len(data) // 2, "long": len(data)}[how]
        path.write_bytes(data[:size] + (b"x" if how == "long" else b""))
    report = verify(store)
    assert damages(report) == [(None, None, ("b",))]
    assert report.damages[0].pack == path.stem


def test_a_damaged_document_is_named(store: Store) -> None:
    flip(folder(store, "snapshots") / "b.snap", -5)
    report = verify(store)
    assert damages(report) == [(None, None, ("b",))]
    assert report.damages[0].pack is None
    assert report.unneeded_packs == 1


def test_only_what_the_named_snapshots_need_is_verified(store: Store) -> None:
    pack_of(store, "b", 1).unlink()
    report = verify(store, ["a", "c"])
    assert report.intact
    assert (report.snapshot_count, report.packs) == (2, 1)
    with pytest.raises(NoSnapshot):
        verify(store, ["a", "x"])


def stored(store: Store, name: str, packs: tuple[bytes, ...], runs: PageRuns) -> None:
    base = store.read_snapshot("c")
    head = replace(base.head, name=name, size=sum(runs.counts) * PAGE)
    document = StoredSnapshot(head, packs, (), runs, base.fills, b"")
    store.place.write_new(snapshot_key(name), document.encode(store.config.key))


def run(place: int, page: int, count: int) -> PageRuns:
    return PageRuns(array("Q", [0]), array("I", [count]), array("I", [place]), array("I", [page]))


def test_a_page_that_its_pack_does_not_have_is_named(store: Store) -> None:
    stored(store, "d", store.read_snapshot("a").packs, run(0, 35, 10))
    report = verify(store)
    assert damages(report) == [(None, None, ("d",))]
    assert "40 pages, and page 44 is needed" in report.damages[0].why


def test_a_base_that_the_snapshot_does_not_list_is_named(store: Store) -> None:
    base = store.read_snapshot("a").packs[0]
    known = {BasePage(base, 3): PAGES[3]}
    pack = put_pack(store, [b"x" + PAGES[3][1:]], {0: BasePage(base, 3)}, known)
    stored(store, "d", (pack,), run(0, 0, 1))
    report = verify(store)
    assert damages(report) == [(None, None, ("d",))]
    assert "is not listed by the snapshot" in report.damages[0].why


def test_damage_of_a_base_hits_what_is_a_difference_to_it(store: Store) -> None:
    path = pack_of(store, "a")
    base = store.read_snapshot("a").packs[0]
    known = {BasePage(base, 3): PAGES[3]}
    pack = put_pack(store, [b"x" + PAGES[3][1:]], {0: BasePage(base, 3)}, known)
    stored(store, "d", (base, pack), run(1, 0, 1))
    assert verify(store).intact
    flip(path, footer_of(store, path).frame(0).offset + 20)
    report = verify(store)
    found = {(damage.pack, damage.names) for damage in report.damages}
    assert found == {(path.stem, ("a",)), (pack.hex(), ("d",))}


def test_an_error_that_is_not_the_packs_is_raised(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> bytes:
        raise TargetError(number, "cannot read", "x")

    snapshot = store.read_snapshot("a")
    number = errno.EIO
    monkeypatch.setattr(type(store.place), "read", read)
    monkeypatch.setattr(Store, "read_snapshot", lambda *_: snapshot)
    assert len(damages(verify(store))) == 2
    for number in (errno.EMFILE, errno.EACCES, errno.ETIMEDOUT):
        with pytest.raises(TargetError) as error:
            verify(store)
        assert error.value.errno == number
