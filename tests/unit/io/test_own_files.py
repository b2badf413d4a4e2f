"""Files of our own: recognised before they are replaced, written whole, removed only when ours."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from pyqmigrate import NoSpace, NotDurable, TargetError, UsageError
from pyqmigrate.io.own_files import FileKind, check_replaceable, remove, write_whole

WAX = FileKind("lump of wax", lambda head: head.startswith(b"wax"))


def write(file: BinaryIO) -> None:
    file.write(b"wax, new")


@pytest.mark.parametrize("old", [None, b"", b"wax, old"])
def test_its_own_kind_and_an_empty_file_are_replaced(tmp_path: Path, old: bytes | None) -> None:
    if old is not None:
        (tmp_path / "lump").write_bytes(old)
    place = check_replaceable(tmp_path / "lump", WAX)
    write_whole(place, WAX, write)
    assert (tmp_path / "lump").read_bytes() == b"wax, new"
    assert [path.name for path in tmp_path.iterdir()] == ["lump"]


def test_a_kind_may_refuse_empty_files(tmp_path: Path) -> None:
    (tmp_path / "lump").touch()
    with pytest.raises(UsageError, match=r"lump of wax would replace .* other content"):
        check_replaceable(tmp_path / "lump", FileKind("lump of wax", WAX.is_ours, False))


def test_a_link_is_followed_to_a_file_that_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("lump")
    write_whole(check_replaceable(tmp_path / "link", WAX), WAX, write)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "lump").read_bytes() == b"wax, new"
    (tmp_path / "lump").write_bytes(b"dear reader")
    with pytest.raises(UsageError, match=r"move (it|that file), or choose"):
        check_replaceable(tmp_path / "link", WAX)


def test_what_came_since_it_was_checked_is_not_replaced(tmp_path: Path) -> None:
    place = check_replaceable(tmp_path / "lump", WAX)
    place.write_bytes(b"dear reader")
    with pytest.raises(UsageError, match=r"lump of wax would replace .* other content"):
        write_whole(place, WAX, write)
    assert place.read_bytes() == b"dear reader"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, number: int, same_descriptors: None
) -> None:
    (tmp_path / "lump").write_bytes(b"wax, old")

    def fail(file: BinaryIO) -> None:
        write(file)
        raise OSError(number, os.strerror(number))

    with pytest.raises(NoSpace if number == errno.ENOSPC else TargetError) as caught:
        write_whole(tmp_path / "lump", WAX, fail)
    assert caught.value.errno == number
    assert (tmp_path / "lump").read_bytes() == b"wax, old"
    assert [path.name for path in tmp_path.iterdir()] == ["lump"]


@pytest.mark.parametrize("sync_name", [True, False])
def test_a_name_that_is_not_durable_is_an_error_where_it_has_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_name: bool
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), tmp_path.stat()):
            raise OSError(errno.EIO, "injected")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    if sync_name:
        with pytest.raises(NotDurable):
            write_whole(tmp_path / "lump", WAX, write)
    else:
        write_whole(tmp_path / "lump", WAX, write, sync_name=False)
    assert (tmp_path / "lump").read_bytes() == b"wax, new"


@pytest.mark.parametrize(
    ("content", "removed"), [(b"wax", True), (b"", False), (b"dear reader", False)]
)
def test_only_what_is_ours_is_removed(tmp_path: Path, content: bytes, removed: bool) -> None:
    (tmp_path / "lump").write_bytes(content)
    assert remove(str(tmp_path / "lump"), WAX) is removed
    assert (tmp_path / "lump").exists() is not removed


def test_a_link_is_not_removed_and_a_missing_file_is_harmless(tmp_path: Path) -> None:
    (tmp_path / "lump").write_bytes(b"wax")
    (tmp_path / "link").symlink_to("lump")
    for name in ("link", "missing", "n" * 300):
        assert not remove(str(tmp_path / name), WAX)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "lump").exists()
