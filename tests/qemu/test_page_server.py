"""A real QEMU gets its memory from a page server while its guest runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.compare_memory import assert_same_blocks
from tests.harness.huge_pages import HUGE_PAGE, huge_pages
from tests.harness.lazy_guest import (
    RAM,
    SavedGuest,
    ServerProcess,
    lazy_guest,
    save_guest,
    wait_for,
)
from tests.harness.machine import RAM_BLOCK
from tests.harness.pattern_guest import check_pattern

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> SavedGuest:
    return save_guest(module_disk)


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pyqmigrate-lazy-") as name:
        yield Path(name)


def assert_arrives(saved: SavedGuest, directory: Path, kind: str, *options: str) -> None:
    with (
        lazy_guest(saved, directory, kind) as guest,
        ServerProcess(saved.path, guest.connect(), *options) as server,
    ):
        server.wait_for("end")
        assert server.wait() == 0
        wait_for(lambda: guest.migration() == "completed", "the migration does not complete")
        assert_same_blocks(guest.read_blocks(), saved.blocks)


@pytest.mark.parametrize("kind", ["private", "memfd", "tmpfs"])
def test_every_block_arrives(saved: SavedGuest, shm: Path, kind: str) -> None:
    assert_arrives(saved, shm, kind)


def test_every_block_arrives_in_huge_pages(saved: SavedGuest, shm: Path) -> None:
    with huge_pages(RAM):
        pages = f'{{"{RAM_BLOCK[saved.machine]}": {HUGE_PAGE}}}'
        assert_arrives(saved, shm, "hugetlb", "--host-pages", pages)
