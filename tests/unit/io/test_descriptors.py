"""Descriptors that are handed in are checked, used, and given back as they were."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pyqmigrate
from pyqmigrate import Descriptors, RamBlock, UsageError
from tests.harness.snapshots import SLOW, known_memory, load, save_known


@contextmanager
def opened(*pairs: tuple[Path, int]) -> Iterator[list[int]]:
    fds = [os.open(path, flags | os.O_CREAT, 0o600) for path, flags in pairs]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def block() -> RamBlock:
    return RamBlock("ram", known_memory())


def save(*args: int | None, **options: int) -> pyqmigrate.SaveReport:
    return pyqmigrate.save(Descriptors(*args, **options), [block()])  # type: ignore[arg-type]


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("mode", [os.O_WRONLY, os.O_RDWR])
@pytest.mark.parametrize("offset", [0, 5000])
def test_a_pair_is_written_directly_and_stays_open(disk: Path, mode: int, offset: int) -> None:
    path = disk / "snap"
    path.write_bytes(b"x" * 5000)
    with opened((path, mode), (path, mode | os.O_DIRECT)) as (buffered, direct):
        report = save(buffered, direct, offset=offset)
        assert report.direct_io
        assert is_open(buffered)
        assert is_open(direct)
    assert path.read_bytes()[:offset] == b"x" * offset
    assert (load(f"file:{path},offset={offset}")["ram"] == known_memory()).all()


def test_a_buffered_descriptor_alone_is_enough(disk: Path) -> None:
    with opened((disk / "snap", os.O_RDWR)) as (fd,):
        report = save(fd)
        assert not report.direct_io
        assert report.direct_io_reason == "no direct descriptor was given"
        assert (load(Descriptors(fd))["ram"] == known_memory()).all()
        with pytest.raises(UsageError, match="second descriptor"):
            pyqmigrate.save(Descriptors(fd), [block()], direct_io="on")


def test_where_the_descriptors_are_does_not_matter_and_is_not_changed(disk: Path) -> None:
    path = disk / "snap"
    with opened((path, os.O_RDWR), (path, os.O_RDWR | os.O_DIRECT)) as (buffered, direct):
        os.lseek(buffered, 12345, os.SEEK_SET)
        os.lseek(direct, 777, os.SEEK_SET)
        save(buffered, direct)
        load(Descriptors(buffered, direct))
        assert os.lseek(buffered, 0, os.SEEK_CUR) == 12345
        assert os.lseek(direct, 0, os.SEEK_CUR) == 777


def test_a_pair_is_loaded_directly_and_stays_open(disk: Path) -> None:
    path = disk / "snap"
    memory = save_known(path)
    with opened((path, os.O_RDONLY), (path, os.O_RDONLY | os.O_DIRECT)) as (buffered, direct):
        with pyqmigrate.open_snapshot(Descriptors(buffered, direct)) as snapshot:
            target = bytearray(len(memory))
            report = snapshot.load({"ram": target}, direct_io="on")
            assert report.direct_io
            assert target == memory.tobytes()
        assert is_open(buffered)
        assert is_open(direct)


def test_a_snapshot_of_descriptors_outlives_them(disk: Path) -> None:
    memory = save_known(disk / "snap")
    with opened((disk / "snap", os.O_RDONLY)) as (fd,):
        snapshot = pyqmigrate.open_snapshot(Descriptors(fd))
    with snapshot:
        assert snapshot.blocks["ram"].read(0, 8192) == memory[:8192].tobytes()


def test_an_unnamed_file_works(disk: Path) -> None:
    fd = os.open(disk, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        save(fd)
        assert (load(Descriptors(fd))["ram"] == known_memory()).all()
    finally:
        os.close(fd)


def test_a_memfd_works() -> None:
    fd = os.memfd_create("snap")
    try:
        save(fd)
        assert (load(Descriptors(fd))["ram"] == known_memory()).all()
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("buffered", "direct"),
    [
        (os.O_RDONLY, None),
        (os.O_RDWR | os.O_APPEND, None),
        (os.O_RDWR | os.O_DIRECT, None),
        (os.O_RDWR, os.O_RDWR),
        (os.O_RDWR, os.O_RDONLY | os.O_DIRECT),
        (os.O_RDWR, os.O_RDWR | os.O_DIRECT | os.O_APPEND),
        (os.O_RDWR | os.O_DIRECT, os.O_RDWR | os.O_DIRECT),
    ],
)
def test_descriptors_of_a_wrong_kind_are_refused_and_the_file_left_alone(
    disk: Path, buffered: int, direct: int | None
) -> None:
    path = disk / "snap"
    memory = save_known(path)
    pairs = [(path, buffered)] + ([(path, direct)] if direct is not None else [])
    with opened(*pairs) as fds, pytest.raises(UsageError):
        save(*fds)
    assert (load(path)["ram"] == memory).all()


def test_a_dup_is_not_a_second_descriptor(disk: Path) -> None:
    with opened((disk / "snap", os.O_RDWR)) as (fd,):
        twin = os.dup(fd)
        with pytest.raises(UsageError, match="dup"):
            save(fd, twin)
        os.close(twin)


def test_descriptors_of_different_files_are_refused(disk: Path) -> None:
    with (
        opened((disk / "a", os.O_RDWR), (disk / "b", os.O_RDWR | os.O_DIRECT)) as fds,
        pytest.raises(UsageError, match="different files"),
    ):
        save(*fds)


def test_a_closed_descriptor_is_refused(disk: Path) -> None:
    with opened((disk / "a", os.O_RDWR)) as (fd,):
        pass
    for given in [fd, -1, 1 << 30]:
        with pytest.raises(UsageError):
            save(given)
        with pytest.raises(UsageError):
            pyqmigrate.open_snapshot(Descriptors(given))


def test_a_negative_offset_is_refused(disk: Path) -> None:
    with opened((disk / "a", os.O_RDWR)) as (fd,), pytest.raises(UsageError):
        save(fd, offset=-1)


def test_what_is_not_a_regular_file_is_refused() -> None:
    left, right = socket.socketpair()
    reader, writer = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    try:
        for fd in [left.fileno(), writer, null]:
            with pytest.raises(UsageError, match="regular file"):
                save(fd)
        for fd in [left.fileno(), reader, null]:
            with pytest.raises(UsageError, match="regular file"):
                pyqmigrate.open_snapshot(Descriptors(fd))
    finally:
        for fd in (reader, writer, null):
            os.close(fd)
        left.close()
        right.close()


def test_a_write_only_descriptor_cannot_be_read(disk: Path) -> None:
    save_known(disk / "snap")
    with opened((disk / "snap", os.O_WRONLY)) as (fd,), pytest.raises(UsageError):
        pyqmigrate.open_snapshot(Descriptors(fd))


@pytest.mark.parametrize("end", ["done", "cancelled", "failed"])
@pytest.mark.parametrize("kind", ["path", "reuse", "offset", "descriptors"])
def test_no_descriptor_is_left_open_by_a_save(
    disk: Path, kind: str, end: str, same_descriptors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = disk / "snap"
    with opened((path, os.O_RDWR), (path, os.O_RDWR | os.O_DIRECT)) as (buffered, direct):
        target = {
            "path": path,
            "reuse": path,
            "offset": f"file:{path},offset=4k",
            "descriptors": Descriptors(buffered, direct),
        }[kind]
        if end == "failed":

            def refuse(fd: int) -> None:
                raise OSError(5, "injected")

            with monkeypatch.context() as patched, pytest.raises(pyqmigrate.TargetError):
                patched.setattr(os, "fsync", refuse)
                pyqmigrate.save(target, [block()], reuse=kind == "reuse")
            return
        bandwidth = SLOW if end == "cancelled" else 0
        job = pyqmigrate.start_save(
            target, [block()], reuse=kind == "reuse", max_bandwidth=bandwidth
        )
        if end == "cancelled":
            job.cancel()
            with pytest.raises(pyqmigrate.Cancelled):
                job.result(5)
        else:
            job.result(5)


@pytest.mark.parametrize("kind", ["path", "pair"])
def test_no_descriptor_is_left_open_by_a_load(
    disk: Path, kind: str, same_descriptors: None
) -> None:
    path = disk / "snap"
    memory = save_known(path)
    with opened((path, os.O_RDONLY), (path, os.O_RDONLY | os.O_DIRECT)) as fds:
        target = path if kind == "path" else Descriptors(*fds)
        assert (load(target)["ram"] == memory).all()
        with pytest.raises(pyqmigrate.BlockMismatch):
            pyqmigrate.start_load(target, {})
        pyqmigrate.start_load(target, {"ram": bytearray(len(memory))}).result(5)
        job = pyqmigrate.start_load(target, {"ram": bytearray(len(memory))})
        job.cancel()
        with pytest.raises(pyqmigrate.Cancelled):
            job.result(5)
        path.write_bytes(b"short")
        with pytest.raises(pyqmigrate.SnapshotError):
            pyqmigrate.open_snapshot(target)
