"""An increment is stored as the file that convert makes of it, and only what it changed is read."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqmigrate import open_snapshot, seal
from pyqmigrate.errors import SnapshotError, TargetError
from pyqmigrate.format.store.snapshot import StoredSnapshot
from pyqmigrate.store import Store, add, plain_snapshot, verify
from pyqmigrate.store.adding import AddReport
from tests.harness.examples import few
from tests.harness.increment_files import save_base, save_increment
from tests.harness.snapshots import Bytes, ram

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "store") as opened:
        yield opened


def changed(memory: Bytes, pages: npt.NDArray[np.bool_], page_size: int, seed: int) -> Bytes:
    """The memory with other content in these pages, some of which become zeros."""
    after = memory.copy().reshape(-1, page_size)
    rng = np.random.default_rng(seed)
    for page in np.flatnonzero(pages):
        after[page] = 0 if rng.integers(0, 4) == 0 else rng.integers(0, 256, page_size, np.uint8)
    return after.reshape(-1)


def converted(store: Store, path: Path, name: str, **options: Any) -> tuple[AddReport, bytes]:
    """Add an increment by conversion, and return the report and the document."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_snapshot, "has_outline", lambda _: False)
        return added(store, path, name, **options)


def added(store: Store, path: Path, name: str, **options: Any) -> tuple[AddReport, bytes]:
    report = add(store, path, name, **options)
    return report, document(store, name)


def document(store: Store, name: str) -> bytes:
    """The document of a snapshot, without what differs between two that are added one after another:
    name, time, parts that were new."""
    found = store.read_snapshot(name)
    head = replace(found.head, name="x", added_ns=0, counts=replace(found.head.counts, new_pages=0))
    head = replace(head, counts=replace(head.counts, new_bytes=0))
    return StoredSnapshot(
        head, found.packs, found.extents, found.runs, found.fills, found.seal, found.companions
    ).encode(store.config.key)


@settings(few, max_examples=6)
@given(st.data(), st.sampled_from([4096, 16384, 65536]), st.booleans(), st.booleans())
def test_the_document_is_that_of_the_converted_file(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    page_size: int,
    sealed: bool,
    stored: bool,
) -> None:
    directory = tmp_path_factory.mktemp("increment")
    memories, after, pages = {}, {}, {}
    for seed, name in enumerate(("pc.ram", "vga", "rom")[: data.draw(st.integers(1, 3))]):
        npages = data.draw(st.integers(1, 4 * MIB // page_size))
        density = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
        memories[name] = ram(npages, density=density, page_size=page_size, seed=seed + npages)
        pages[name] = np.zeros(npages, np.bool_)
        pages[name][data.draw(st.lists(st.integers(0, npages - 1), max_size=6))] = True
        after[name] = changed(memories[name], pages[name], page_size, seed)
    base, path = directory / "base", directory / "increment"
    save_base(base, memories, page_size=page_size)
    if sealed:
        seal(base)
    save_increment(path, base, after, pages, page_size=page_size, sections=b"")
    with Store.create(directory / "store") as store:
        if stored:
            add(store, base)
        report, ours = added(store, path, "ours")
        other, theirs = converted(store, path, "theirs", parent=report.parent)
        assert ours == theirs
        assert (report.parent, report.source) == ("base" if stored else None, "increment")
        assert report.data_bytes == other.data_bytes
        assert verify(store).intact
        with store.open_file("ours") as file:
            assert bytes(file.read(0, file.size)) == expected(path, directory / "whole")


def expected(path: Path, whole: Path) -> bytes:
    from pyqmigrate import convert

    convert(path, whole, to="mapped-ram")
    return whole.read_bytes()


def sealed_pair(
    tmp_path: Path, dirty: list[int], *, algorithm: str = "xxh3-128"
) -> tuple[Path, Path]:
    """A sealed base of 16 MiB, and an increment with these pages."""
    npages = 16 * MIB // PAGE
    memory = ram(npages, density=1.0)
    base, path = tmp_path / "base", tmp_path / "increment"
    save_base(base, {"pc.ram": memory})
    seal(base, algorithm=algorithm)
    pages = np.zeros(npages, np.bool_)
    pages[dirty] = True
    save_increment(path, base, {"pc.ram": changed(memory, pages, PAGE, 1)}, {"pc.ram": pages})
    return base, path


def test_pieces_without_a_changed_page_are_not_read(store: Store, tmp_path: Path) -> None:
    base, path = sealed_pair(tmp_path, [3, 300, 3000])
    add(store, base)
    report = add(store, path)
    assert report.new_pages <= 3
    # Three pieces of pages, and those of the header and the end.
    assert report.bytes_read <= 5 * MIB
    assert verify(store).intact


@pytest.mark.parametrize("why", ["no seal", "damaged seal", "blake3", "not stored", "no parent"])
def test_everything_is_read_if_the_parent_is_not_known_to_have_it(
    store: Store, tmp_path: Path, why: str
) -> None:
    base, path = sealed_pair(tmp_path, [3], algorithm="blake3" if why == "blake3" else "xxh3-128")
    if why != "not stored":
        add(store, base)
    if why == "no seal":
        Path(f"{base}.seal").unlink()
    elif why == "damaged seal":
        Path(f"{base}.seal").write_bytes(Path(f"{base}.seal").read_bytes()[:-1])
    with open_snapshot(path) as snapshot:  # which does not need the seal any more
        report = add(store, snapshot, parent=None if why == "no parent" else "auto")
    assert report.bytes_read >= 16 * MIB
    assert verify(store).intact


def test_pages_of_an_incomplete_parent_are_read(store: Store, tmp_path: Path) -> None:
    base, path = sealed_pair(tmp_path, [3])
    add(store, base)
    assert store.place.directory is not None
    for pack in (store.place.directory / "packs").iterdir():
        pack.unlink()
    with Store.open(store.place.directory) as again:
        report = add(again, path)
        assert report.bytes_read >= 16 * MIB
        assert verify(again, [path.name]).intact


@pytest.mark.parametrize("which", ["base", "increment"])
def test_a_file_that_changes_meanwhile_is_an_error(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    base, path = sealed_pair(tmp_path, [3])
    real = plain_snapshot.write_outline

    def touched(*arguments: Any) -> bytes | None:
        os.utime(base if which == "base" else path, ns=(1, 10**18))
        return real(*arguments)

    monkeypatch.setattr(plain_snapshot, "write_outline", touched)
    with pytest.raises(TargetError, match="was changed while it was being added"):
        add(store, path)
    assert store.names() == []


def test_a_base_that_is_cut_off_is_an_error(store: Store, tmp_path: Path) -> None:
    base, path = sealed_pair(tmp_path, [3])
    with open_snapshot(path) as snapshot:
        os.truncate(base, 4 * MIB)
        with pytest.raises(SnapshotError):
            add(store, snapshot, "cut")
    assert store.names() == []


def test_no_copy_of_the_memory_is_made(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = sealed_pair(tmp_path, [3, 300])
    sizes = []
    real = plain_snapshot.write_outline

    def measured(increment: Any, fd: int, parent: Any) -> bytes | None:
        unchanged = real(increment, fd, parent)
        sizes.append(os.fstat(fd).st_blocks * 512)
        return unchanged

    monkeypatch.setattr(plain_snapshot, "write_outline", measured)
    add(store, path)
    assert len(sizes) == 1
    assert sizes[0] < MIB


def test_a_temporary_file_needs_no_file_system_with_unnamed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: object, flags: int, *arguments: int, **options: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *arguments, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fd = plain_snapshot.unnamed_file(tmp_path, tmp_path / "snap")
    os.write(fd, b"data")
    assert os.pread(fd, 4, 0) == b"data"
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert not list(tmp_path.iterdir())
