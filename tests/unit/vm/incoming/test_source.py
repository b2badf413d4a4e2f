"""The snapshot of a restore, before QEMU starts."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from pyqmigrate import Descriptors, NotSupported, RamBlock, TargetError, save
from pyqmigrate.vm.incoming.source import RestoreSource
from tests.harness.snapshots import ram, turn_bitmaps


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save(tmp_path / "guest.mapped", [RamBlock("pc.ram", ram(512))])
    return tmp_path / "guest.mapped"


@pytest.mark.usefixtures("same_descriptors")
def test_file_whose_bitmaps_qemu_would_misread_here_is_not_restored(disk: Path) -> None:
    save(disk / "s", [RamBlock("ram", ram(1024))], machine="s390-ccw-virtio-10.0", sparse="exact")
    turn_bitmaps(disk / "s")
    with pytest.raises(NotSupported, match="convert it to mapped-ram"):
        RestoreSource(disk / "s", None)


def test_lock_of_the_callers_descriptor_stays_what_it_is(path: Path) -> None:
    with path.open("rb") as caller, path.open("rb") as other:
        fcntl.flock(caller, fcntl.LOCK_EX)
        with pytest.raises(TargetError, match="writing the snapshot in place"):
            RestoreSource(Descriptors(caller.fileno()), None)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_descriptor_that_can_only_be_duplicated_keeps_its_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def refuse(name: str, *arguments: int, **options: int) -> int:
        if str(name).startswith("/proc/self/fd/"):
            raise PermissionError(13, "Permission denied", name)
        return really_open(name, *arguments, **options)

    with path.open("rb") as caller:
        fcntl.flock(caller, fcntl.LOCK_EX)
        monkeypatch.setattr(os, "open", refuse)
        source = RestoreSource(Descriptors(caller.fileno()), None)
        try:
            with path.open("rb") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            source.close()
