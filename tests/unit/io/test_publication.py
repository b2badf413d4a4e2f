"""After a name is given: what is published is published, and an error says what is not durable."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyqmigrate
from pyqmigrate import (
    NotDurable,
    RamBlock,
    TargetError,
    UsageError,
    open_snapshot,
    seal,
    verify_seal,
)
from pyqmigrate.export.convert import convert
from pyqmigrate.export.raw import unpack
from pyqmigrate.integrity import seal as sealing
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.output import OutputFile
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from tests.harness.snapshots import SLOW, known_memory, load, save_known

Breaks = Callable[[Path], None]


@pytest.fixture
def directory_fails(monkeypatch: pytest.MonkeyPatch) -> Breaks:
    """From the call on, the fsync of this directory fails."""

    def make(directory: Path) -> None:
        real = os.fsync

        def fsync(fd: int) -> None:
            if os.path.samestat(os.fstat(fd), directory.stat()):
                raise OSError(errno.EIO, "injected")
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)

    return make


def test_a_snapshot_whose_name_is_not_durable_is_there_and_the_error_says_so(
    disk: Path, directory_fails: Breaks
) -> None:
    (disk / "snap").write_bytes(b"an old one")
    directory_fails(disk)
    with pytest.raises(NotDurable, match="is there and whole") as caught:
        save_known(disk / "snap")
    assert isinstance(caught.value, TargetError)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(disk / "snap")
    assert (load(disk / "snap")["ram"] == known_memory()).all()
    assert [path.name for path in disk.iterdir()] == ["snap"]


def test_a_target_says_whether_it_was_published(disk: Path, directory_fails: Breaks) -> None:
    target = OutputFile.open(disk / "snap", DirectIO.OFF)
    assert not target.published
    directory_fails(disk)
    with pytest.raises(NotDurable):
        target.publish(b"QEVM", lambda: None)
    assert target.published
    target.abort()
    assert (disk / "snap").read_bytes() == b"QEVM"


def test_a_target_that_gets_no_name_was_not_published(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = OutputFile.open(disk / "snap", DirectIO.OFF)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(TargetError) as caught:
        target.publish(b"QEVM", lambda: None)
    assert not isinstance(caught.value, NotDurable)
    assert not target.published
    target.abort()


@pytest.mark.parametrize("call", ["fdatasync", "directory"])
def test_in_place_the_magic_is_there_when_it_may_not_be_durable(
    disk: Path, monkeypatch: pytest.MonkeyPatch, directory_fails: Breaks, call: str
) -> None:
    if call == "directory":
        directory_fails(disk)
    else:

        def refuse(_: int) -> None:
            raise OSError(errno.EIO, "injected")

        monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(NotDurable):
        save_known(disk / "snap", reuse=True)
    assert (load(disk / "snap")["ram"] == known_memory()).all()


def sealed(disk: Path) -> Path:
    seal(disk / "snap")
    return disk / "snap.seal"


def exported(disk: Path) -> Path:
    convert(disk / "snap", disk / "stream", to="stream")
    return disk / "stream"


def unpacked(disk: Path) -> Path:
    (disk / "out").mkdir(exist_ok=True)
    with open_snapshot(disk / "snap") as snapshot:
        unpack(snapshot, disk / "out")
    return disk / "out"


@pytest.mark.parametrize("work", [sealed, exported, unpacked])
def test_so_are_all_other_files_that_get_a_name(
    disk: Path, directory_fails: Breaks, work: Callable[[Path], Path]
) -> None:
    memory = save_known(disk / "snap")
    if work is unpacked:
        (disk / "out").mkdir()
        directory_fails(disk / "out")
    else:
        directory_fails(disk)
    with pytest.raises(NotDurable, match="is there and whole"):
        work(disk)
    if work is sealed:
        check = verify_seal(disk / "snap")
        assert check is not None
        assert check.intact
    elif work is exported:
        with open_snapshot(disk / "stream") as stream:
            assert stream.blocks["ram"].read(0, len(memory)) == memory.tobytes()
    else:
        assert (disk / "out/ram.raw").read_bytes() == memory.tobytes()
        assert sorted(path.name for path in (disk / "out").iterdir()) == ["blocks.json", "ram.raw"]


# ---- an unpack has all names or none -------------------------------------------------------------


@pytest.fixture(params=["unnamed", "hidden", "no links"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With unnamed files, without them, and without hard links either."""
    real_open = os.open

    def without(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "injected")
        return real_open(path, flags, *args, **more)

    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "injected")

    if request.param != "unnamed":
        monkeypatch.setattr(os, "open", without)
    if request.param == "no links":
        monkeypatch.setattr(os, "link", no_links)


def contents(directory: Path) -> dict[str, bytes | str]:
    return {
        path.name: str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(directory.iterdir())
    }


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("old", [True, False])
def test_an_unpack_whose_last_name_cannot_be_given_leaves_all_as_it_was(
    disk: Path, monkeypatch: pytest.MonkeyPatch, file_system: None, failing: int, old: bool
) -> None:
    names = ["one.raw", "two.raw", "blocks.json"]
    pyqmigrate.save(disk / "snap", [RamBlock(name, known_memory()) for name in ("one", "two")])
    (disk / "out").mkdir()
    if old:
        (disk / "out/one.raw").write_bytes(b"an old one")
        (disk / "elsewhere").write_bytes(b"far away")
        (disk / "out/two.raw").symlink_to("../elsewhere")
        (disk / "out/blocks.json").write_bytes(b'{"machine": "", "blocks": []}')
    before = contents(disk / "out")
    real_link, real_replace = os.link, os.replace

    def link(source: str, name: str, **more: Any) -> None:
        if name == names[failing]:
            raise OSError(errno.EIO, "injected")
        real_link(source, name, **more)

    def replace(source: str, name: str, **more: Any) -> None:
        if name == names[failing] and ".old-" not in source:
            raise OSError(errno.EIO, "injected")
        real_replace(source, name, **more)

    with monkeypatch.context() as patched, open_snapshot(disk / "snap") as snapshot:
        patched.setattr(os, "link", link)
        patched.setattr(os, "replace", replace)
        with pytest.raises(TargetError) as caught:
            unpack(snapshot, disk / "out")
        assert caught.value.errno == errno.EIO
    assert contents(disk / "out") == before
    if old:
        assert (disk / "elsewhere").read_bytes() == b"far away"
    with open_snapshot(disk / "snap") as snapshot:
        unpack(snapshot, disk / "out")
    assert sorted(contents(disk / "out")) == sorted(names)


def test_what_cannot_be_restored_is_named(
    disk: Path, monkeypatch: pytest.MonkeyPatch, same_descriptors: None
) -> None:
    save_known(disk / "snap")
    (disk / "out").mkdir()
    (disk / "out/ram.raw").write_bytes(b"an old one")
    real = os.replace

    def replace(source: str, name: str, **more: Any) -> None:
        if name == "blocks.json" or ".old-" in source:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, name, **more)

    (disk / "out/blocks.json").write_bytes(b'{"machine": "", "blocks": []}')
    monkeypatch.setattr(os, "replace", replace)
    with open_snapshot(disk / "snap") as snapshot, pytest.raises(TargetError) as caught:
        unpack(snapshot, disk / "out")
    assert any("'ram.raw' could not be restored" in note for note in caught.value.__notes__)


# ---- the directory changes, the name changes -----------------------------------------------------


def test_the_seal_is_beside_the_snapshot_whatever_becomes_of_the_current_directory(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (disk / "here").mkdir()
    monkeypatch.chdir(disk / "here")
    for name, options in [("snap", {}), ("reused", {"reuse": True})]:
        monkeypatch.chdir(disk / "here")
        job = pyqmigrate.start_save(
            name,
            [RamBlock("ram", known_memory())],
            max_bandwidth=SLOW,
            seal="xxh3-128",
            **options,  # type: ignore[arg-type]
        )
        monkeypatch.chdir("/")
        job.set_max_bandwidth(0)
        job.result(20)
    assert sorted(path.name for path in (disk / "here").iterdir()) == [
        "reused",
        "reused.seal",
        "snap",
        "snap.seal",
    ]
    for name in ("snap", "reused"):
        check = verify_seal(disk / "here" / name)
        assert check is not None
        assert check.intact


def test_a_file_is_sealed_where_it_was_whatever_becomes_of_the_current_directory(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_known(disk / "snap")
    monkeypatch.chdir(disk)
    find = sealing.find_stale

    def found(*arguments: Any) -> dict[str, int]:
        os.chdir("/")
        return find(*arguments)

    monkeypatch.setattr(sealing, "find_stale", found)
    report = seal("snap")
    assert report.seal == str(disk / "snap.seal")
    assert (disk / "snap.seal").exists()


def test_an_index_is_kept_where_it_was_named(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_sequential_save(disk / "stream", [RamBlock("ram", known_memory())]).wait()
    monkeypatch.chdir(disk)
    with open_snapshot("stream", index="index") as snapshot:
        monkeypatch.chdir("/")
        snapshot.verify()
    assert (disk / "index").exists()


@pytest.mark.parametrize("how", ["replaced", "removed", "link turned"])
def test_an_in_place_save_whose_name_was_taken_meanwhile_fails(disk: Path, how: str) -> None:
    save_known(disk / "snap", seed=1)
    name = disk / "snap"
    if how == "link turned":
        (disk / "link").symlink_to("snap")
        name = disk / "link"
    job = pyqmigrate.start_save(
        name, [RamBlock("ram", known_memory())], max_bandwidth=SLOW, reuse=True
    )
    if how == "replaced":
        (disk / "other").write_bytes(b"another file")
        (disk / "other").replace(disk / "snap")
    elif how == "removed":
        (disk / "snap").unlink()
    else:
        (disk / "other").write_bytes(b"another file")
        (disk / "link").unlink()
        (disk / "link").symlink_to("other")
    job.set_max_bandwidth(0)
    with pytest.raises(TargetError, match="not under this name"):
        job.result(20)
    if how != "removed":
        assert name.read_bytes() == b"another file"


def test_an_in_place_save_through_a_descriptors_path_works(disk: Path) -> None:
    """/proc/self/fd leads to the file, whatever its link says, even when it has no name."""
    fd = os.open(disk, os.O_TMPFILE | os.O_RDWR)
    memory = save_known(Path(f"/proc/self/fd/{fd}"), reuse=True)
    assert (load(f"/proc/self/fd/{fd}")["ram"] == memory).all()
    os.close(fd)
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_what_takes_the_name_during_a_save_and_is_not_a_file_stays(disk: Path, kind: str) -> None:
    target = OutputFile.open(disk / "snap", DirectIO.OFF)
    if kind == "fifo":
        os.mkfifo(disk / "snap")
    else:
        (disk / "snap").mkdir()
    with pytest.raises((UsageError, TargetError)):
        target.publish(b"QEVM", lambda: None)
    target.abort()
    assert (disk / "snap").is_fifo() or (disk / "snap").is_dir()
    assert [path.name for path in disk.iterdir()] == ["snap"]


def test_a_link_that_turns_while_it_is_opened_in_place_is_noticed(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_known(disk / "snap")
    (disk / "precious").write_bytes(b"precious")
    real = os.open

    def opened(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_CREAT and path == disk / "snap":
            (disk / "snap").unlink()
            (disk / "snap").symlink_to("precious")
        return real(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(TargetError, match="was replaced while it was opened"):
        save_known(disk / "snap", reuse=True)
    assert (disk / "precious").read_bytes() == b"precious"
