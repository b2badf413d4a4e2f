"""Huge pages for guests of tests."""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["HUGE_PAGE", "huge_pages"]

HUGE_PAGE = 2 << 20
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_LOCK = Path(tempfile.gettempdir()) / "pyqmigrate-tests-huge-pages"


@contextlib.contextmanager
def huge_pages(length: int) -> Iterator[None]:
    """Have ``length`` bytes of free huge pages; skip the test where the host does not give them.

    The host's pool is as it was afterwards. Tests of several processes take turns.
    """
    needed = -(-length // HUGE_PAGE)
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            before = _read("nr_hugepages")
            if _read("free_hugepages") >= needed:
                yield
                return
            _write(before + needed)
        except OSError as error:
            pytest.skip(f"huge pages are not available: {error}")
        try:
            if _read("free_hugepages") < needed:
                pytest.skip(f"the host does not give {needed} huge pages")
            yield
        finally:
            _write(before)


def _read(name: str) -> int:
    return int((_POOL / name).read_text())


def _write(count: int) -> None:
    (_POOL / "nr_hugepages").write_text(f"{count}\n")
