"""What a file holds in the page cache."""

from __future__ import annotations

import mmap
import os
import platform
import time
from pathlib import Path

import pytest

import pyqmigrate.io.page_cache as page_cache
from pyqmigrate import TargetError
from pyqmigrate.io.page_cache import cached_bytes, drop_cached

SIZE = 4 << 20
KERNEL = tuple(int(part) for part in platform.release().split(".")[:2])


def test_written_file_is_cached_until_it_is_dropped(disk: Path) -> None:
    (disk / "file").write_bytes(os.urandom(SIZE))
    with (disk / "file").open("rb") as file:
        assert cached_bytes(file.fileno()) == SIZE
        drop_cached(file.fileno())
        assert cached_bytes(file.fileno()) == 0


def test_one_page_that_was_read_is_counted(disk: Path) -> None:
    (disk / "file").write_bytes(os.urandom(SIZE))
    with (disk / "file").open("rb") as file:
        drop_cached(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 1, SIZE // 2)
        assert mmap.PAGESIZE <= cached_bytes(file.fileno()) < SIZE // 2


def test_kernels_without_the_quick_question_answer_for_each_page(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (disk / "file").write_bytes(os.urandom(SIZE))
    with (disk / "file").open("rb") as file:
        drop_cached(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), SIZE // 2, 0)
        quick = cached_bytes(file.fileno())
        monkeypatch.setattr(page_cache, "_CACHESTAT", -1)
        assert cached_bytes(file.fileno()) == quick > 0


@pytest.mark.skipif(KERNEL < (6, 5), reason="the kernel has no cachestat")
def test_question_does_not_take_longer_for_holes(disk: Path) -> None:
    with (disk / "file").open("w+b") as file:
        file.truncate(1 << 42)
        started = time.process_time()
        assert cached_bytes(file.fileno()) == 0
        assert time.process_time() - started < 5  # for each page it is 40


def test_empty_file_caches_nothing(disk: Path) -> None:
    (disk / "file").touch()
    with (disk / "file").open("rb") as file:
        assert cached_bytes(file.fileno()) == 0


def test_what_cannot_be_mapped_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    fd = os.open(tmp_path / "file", os.O_WRONLY)
    try:
        with pytest.raises(TargetError):
            cached_bytes(fd)
    finally:
        os.close(fd)
