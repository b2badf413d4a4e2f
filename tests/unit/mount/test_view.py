"""Views of stores and compact files: private mounts, and copies where nothing can be mounted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyqmigrate
from pyqmigrate.cli import main
from pyqmigrate.errors import NotSupported, SnapshotError, UsageError
from pyqmigrate.format.store.keys import working_set_key
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.working_set import TouchedRun, WorkingSet, WorkingSetLine
from pyqmigrate.io.companion_file import identify_snapshot
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.view import ViewOptions
from pyqmigrate.mount import view as views
from pyqmigrate.mount.copied import CopiedView
from pyqmigrate.mount.view import MountedView, make_view
from pyqmigrate.mount.working_sets import working_set_ranges
from pyqmigrate.store.store import Store
from tests.harness.mounted import await_that
from tests.harness.sealed import PAGE, Sealed
from tests.harness.snapshots import load
from tests.harness.stored_guests import store_file


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    return Sealed.make(tmp_path_factory.mktemp("sealed") / "guest")


@pytest.fixture(scope="module")
def store(sealed: Sealed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.create(tmp_path_factory.mktemp("stores") / "store") as store:
        store_file(store, sealed.path, "monday")
        yield store


@pytest.fixture
def compact(sealed: Sealed, tmp_path: Path) -> Path:
    path = tmp_path / "guest.zst"
    assert main(["--quiet", "compact", str(sealed.path), str(path)]) == 0
    return path


@pytest.fixture
def no_mounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing can be mounted; the directory in which copies are made."""

    def refuse(*_: object, **__: object) -> None:
        raise NotSupported("this system has no FUSE")

    monkeypatch.setattr(views, "open_private", refuse)
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setenv("TMPDIR", str(copies))
    return copies


@pytest.fixture
def mounts(tmp_path: Path) -> None:
    try:
        with contextlib.closing(make_view(os.fspath(tmp_path / "x"), None, ViewOptions())):
            pass
    except NotSupported as error:
        pytest.skip(str(error))
    except OSError:
        pass


@pytest.mark.usefixtures("mounts")
def test_stored_snapshot_is_shown_byte_for_byte(
    sealed: Sealed, store: Store, same_descriptors: None
) -> None:
    with contextlib.closing(InputFile(f"{store.name}#monday")) as source:
        assert source.view is not None
        assert isinstance(source.view.view, MountedView)
        assert source.read_at(0, source.size) == sealed.path.read_bytes()
    check = pyqmigrate.verify_seal(f"{store.name}#monday")
    assert check is not None
    assert check.intact


@pytest.mark.usefixtures("mounts")
def test_compact_file_is_shown_byte_for_byte(sealed: Sealed, compact: Path) -> None:
    with contextlib.closing(InputFile(compact)) as source:
        assert source.read_at(0, source.size) == sealed.path.read_bytes()
    memories = load(compact)
    assert (memories["big"] == sealed.big).all()
    check = pyqmigrate.verify_seal(compact)
    assert check is not None
    assert check.intact


@pytest.mark.usefixtures("mounts")
def test_working_set_is_written_beside_a_compact_file_and_shown(compact: Path) -> None:
    view = make_view(os.fspath(compact), None, ViewOptions())
    try:
        assert view.check_recordable() == f"{compact}.workingset"
        view.write_working_set(b"recorded")
    finally:
        view.close()
    view = make_view(os.fspath(compact), None, ViewOptions())
    try:
        assert Path(f"{view.path}.workingset").read_bytes() == b"recorded"
    finally:
        view.close()


@pytest.mark.usefixtures("mounts")
def test_reads_are_noted_if_that_is_wanted(sealed: Sealed, store: Store) -> None:
    view = make_view(store.name, "monday", ViewOptions(record=True))
    try:
        fd = os.open(view.path, os.O_RDONLY)
        try:
            os.pread(fd, 4096, 3 << 20)
            assert any(offset <= 3 << 20 < offset + length for offset, length in view.requests())
        finally:
            os.close(fd)
    finally:
        view.close()


WORKING_SET = WorkingSet([TouchedRun(0, 700, 100), TouchedRun(1, 3, 2), TouchedRun(0, 0, 1)])


@pytest.fixture
def recorded(sealed: Sealed, store: Store) -> Iterator[list[tuple[int, int]]]:
    """A working set in the store: where its ranges are in the file."""
    with pyqmigrate.open_snapshot(sealed.path) as snapshot:
        blocks = [BlockSpec(b.name, b.length, b.page_size) for b in snapshot.blocks.values()]
        starts = [block.pages_offset for block in snapshot.blocks.values()]
        identity = identify_snapshot(sealed.path, snapshot.source.fd)
    line = WorkingSetLine.of(identity, blocks, len(WORKING_SET), 1.0)
    store.write_working_set("monday", line.encode(WORKING_SET) + WORKING_SET.encode())
    yield [(starts[run.block] + run.first * PAGE, run.npages * PAGE) for run in WORKING_SET]
    store.place.delete(working_set_key("monday"))


def test_ranges_of_a_working_set_are_in_its_order(
    store: Store, recorded: list[tuple[int, int]]
) -> None:
    with store.open_file("monday") as file:
        assert working_set_ranges(file) == recorded


def test_working_set_of_another_snapshot_has_no_ranges(
    store: Store, recorded: list[tuple[int, int]]
) -> None:
    with store.open_file("monday") as file:
        file.mtime_ns += 1
        assert working_set_ranges(file) == []


def test_damaged_working_set_has_none(store: Store, recorded: list[tuple[int, int]]) -> None:
    content = store.working_set("monday")
    assert content is not None
    store.write_working_set("monday", content[:-8])
    with store.open_file("monday") as file, pytest.raises(SnapshotError, match="working set"):
        working_set_ranges(file)


def accepts(view: MountedView, ranges: list[tuple[int, int]]) -> bool:
    """Push ranges, unless another list is being pushed still."""
    try:
        view.push(ranges)
    except UsageError:
        return False
    return True


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize("kind", ["local", "damaged"])
def test_working_set_is_pushed_without_being_asked_for(
    store: Store, recorded: list[tuple[int, int]], kind: str
) -> None:
    if kind == "damaged":
        store.write_working_set("monday", b"not one")
    view = make_view(store.name, "monday", ViewOptions(ahead=True))
    assert isinstance(view, MountedView)
    total = sum(length for _, length in recorded)
    try:
        if kind == "local":
            await_that(lambda: view.status()["pushed"] == total)
        fd = os.open(view.path, os.O_RDONLY)
        os.close(fd)
        view.push(recorded)  # what was pushed is not pushed again
        await_that(lambda: view.status()["pushed"] == total)
        await_that(lambda: accepts(view, recorded[:1]))
    finally:
        view.close()


def test_without_a_mount_a_stored_snapshot_is_copied(
    sealed: Sealed, store: Store, no_mounts: Path, same_descriptors: None
) -> None:
    with contextlib.closing(InputFile(f"{store.name}#monday")) as source:
        assert source.view is not None
        assert isinstance(source.view.view, CopiedView)
        assert source.read_at(0, source.size) == sealed.path.read_bytes()
        assert os.listdir(no_mounts)
    assert os.listdir(no_mounts) == []
    check = pyqmigrate.verify_seal(f"{store.name}#monday")
    assert check is not None
    assert check.intact


def test_without_a_mount_a_compact_file_is_copied(
    sealed: Sealed, compact: Path, no_mounts: Path
) -> None:
    assert (load(compact)["small"] == sealed.small).all()
    assert os.listdir(no_mounts) == []


def test_without_a_mount_the_errors_are_the_same(
    store: Store, no_mounts: Path, same_descriptors: None
) -> None:
    with pytest.raises(UsageError, match=r"there is no snapshot 'tuesday'"):
        InputFile(f"{store.name}#tuesday")
    assert os.listdir(no_mounts) == []


def test_damaged_compact_file_is_an_error(compact: Path) -> None:
    content = bytearray(compact.read_bytes())
    content[-9] ^= 0xFF  # the number of frames
    compact.write_bytes(content)
    with pytest.raises(SnapshotError, match="seek table"):
        load(compact)
