"""The view of a system that has no FUSE: a copy that goes when the view is closed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from pyqmigrate.errors import SnapshotTruncated, TargetError
from pyqmigrate.io.plain_file import LocalPlainFile
from pyqmigrate.mount.copied import CopiedView
from tests.harness.sealed import Sealed
from tests.harness.snapshots import data_bytes


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    return directory


@pytest.fixture
def sealed(disk: Path) -> Sealed:
    return Sealed.make(disk / "guest")


def test_copy_is_the_file_with_its_time_and_its_seal(sealed: Sealed) -> None:
    view = CopiedView(LocalPlainFile(sealed.path), "monday")
    try:
        assert view.path.name == "monday"
        assert view.path.read_bytes() == sealed.path.read_bytes()
        assert view.path.stat().st_mtime_ns == sealed.path.stat().st_mtime_ns
        assert Path(f"{view.path}.seal").read_bytes() == sealed.seal.read_bytes()
    finally:
        view.close()


def test_holes_stay_holes(disk: Path) -> None:
    sealed = Sealed.make(disk / "guest", density=0.01)
    view = CopiedView(LocalPlainFile(sealed.path), "monday")
    try:
        size = sealed.path.stat().st_size
        assert data_bytes(view.path, 0, size) < size / 2
    finally:
        view.close()


def test_nothing_is_left_when_it_is_closed(
    sealed: Sealed, temporary: Path, same_descriptors: None
) -> None:
    file = LocalPlainFile(sealed.path)
    view = CopiedView(file, "monday")
    file.close()
    fd = os.open(view.path, os.O_RDONLY)
    view.close()
    view.close()
    assert os.listdir(temporary) == []
    assert os.pread(fd, 4, 0)  # who has it open keeps it
    os.close(fd)


class Failing(LocalPlainFile):
    """A file whose data end early, or cannot be read."""

    def __init__(self, path: Path, error: OSError | None) -> None:
        super().__init__(path)
        self._error = error

    def read(self, offset: int, length: int) -> bytes:
        if offset < 1 << 20:
            return super().read(offset, min(length, (1 << 20) - offset))
        if self._error is not None:
            raise self._error
        return b""

    @property
    def companions(self) -> Mapping[str, bytes]:
        raise AssertionError("the copy was not stopped")


@pytest.mark.parametrize(
    ("error", "kind"),
    [(None, SnapshotTruncated), (TargetError(5, "pack 12 is damaged", "store"), TargetError)],
)
def test_failure_is_passed_on_and_leaves_nothing(
    sealed: Sealed, temporary: Path, error: OSError | None, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=r"ends early|pack 12 is damaged"):
        CopiedView(Failing(sealed.path, error), "monday")
    assert os.listdir(temporary) == []
