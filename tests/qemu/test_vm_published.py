"""A save of a guest whose snapshot has its name, and something fails after that."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from pyqmigrate import NotDurable, open_snapshot, verify_seal
from pyqmigrate.io.job import Progress
from pyqmigrate.vm.record.contents import read_record, record_path
from tests.harness.saving import source

pytestmark = pytest.mark.qemu

ENGINES = ["qemu", "direct"]


def name_is_not_durable(directory: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fsync of the directory fails once the file has its name."""
    real = os.fsync

    def fsync(fd: int) -> None:
        here = os.path.samestat(os.fstat(fd), directory.stat())
        if here and (directory / name).exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


def with_disk(directory: Path) -> tuple[str, ...]:
    (directory / "image").write_bytes(bytes(1 << 20))
    return ("-drive", f"file={directory}/image,format=raw,if=virtio")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_disks_that_belong_to_a_published_snapshot_stay(
    engine: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with source(disk, extra=with_disk(disk)) as guest:
        with monkeypatch.context() as patched:
            name_is_not_durable(disk, "snapshot", patched)
            with pytest.raises(NotDurable, match="is there and whole") as caught:
                guest.save(disk / "snapshot", engine=engine, with_disks=True)
        with open_snapshot(disk / "snapshot") as snapshot:
            snapshot.verify()
        record = record_path(disk / "snapshot")
        told = json.loads(record.read_text())["disks"][0]
        (medium,) = (d["inserted"] for d in guest.vm.execute("query-block") if "inserted" in d)
        assert medium["file"] == told["continued_in"], "the overlay was merged back"
        assert any(str(record) in note for note in caught.value.__notes__)
        assert guest.settings() == guest.before
        assert guest.status() == "running"
        guest.wait_for_count(guest.count() + 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_record_whose_name_is_not_durable_is_a_note(
    engine: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot is published by then, and its disks stay with it."""
    with source(disk, extra=with_disk(disk)) as guest:
        with monkeypatch.context() as patched:
            name_is_not_durable(disk, "snapshot.vm.json", patched)
            report = guest.save(disk / "snapshot", engine=engine, with_disks=True)
        assert any("may not survive a power failure" in note for note in report.notes)
        assert read_record(disk / "snapshot") is not None
        (medium,) = (d["inserted"] for d in guest.vm.execute("query-block") if "inserted" in d)
        assert medium["file"] != str(disk / "image")


def test_a_guest_is_not_ended_while_its_snapshot_may_be_lost(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with source(disk) as guest:
        with monkeypatch.context() as patched:
            name_is_not_durable(disk, "snapshot", patched)
            with pytest.raises(NotDurable):
                guest.save(disk / "snapshot", engine="direct", then="quit")
        assert guest.vm.process.poll() is None
        assert guest.status() == "running"
        guest.wait_for_count(guest.count() + 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_relative_name_is_that_of_the_start(
    engine: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (disk / "here").mkdir()

    def leave(_: Progress) -> None:
        os.chdir("/")

    with source(disk, extra=with_disk(disk)) as guest:
        monkeypatch.chdir(disk / "here")
        guest.save(
            Path("snapshot"), engine=engine, seal="xxh3-128", with_disks=True, progress=leave
        )
    assert sorted(path.name for path in (disk / "here").iterdir()) == [
        "snapshot",
        "snapshot.seal",
        "snapshot.vm.json",
    ]
    check = verify_seal(disk / "here/snapshot")
    assert check is not None
    assert check.intact
