"""A guest runs before its memory is there, and has all of it in the end."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.errors import NotSupported
from pyqmigrate.vm.incoming.options import Mode
from pyqmigrate.vm.incoming.restore import restore
from tests.harness.lazy_guests import lazily_whole, restored_lazily
from tests.harness.saved import RAM, Saved, save_guest

pytestmark = pytest.mark.qemu

M = str(RAM >> 20)


def backend(kind: str, **properties: str) -> list[str]:
    """The options of a machine pc whose memory is this backend."""
    more = "".join(f",{name.replace('_', '-')}={value}" for name, value in properties.items())
    return [
        *("-M", "pc,memory-backend=pc.ram", "-m", M),
        *("-object", f"memory-backend-{kind},id=pc.ram,size={M}M{more}"),
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_guest(tmp_path_factory.mktemp("pc"), ["-M", "pc", "-m", M])


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    """A directory on a tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pyqmigrate-test-") as directory:
        yield Path(directory)


@pytest.mark.parametrize("machine", ["pc", "q35", "microvm"])
def test_a_guest_goes_on_lazily(machine: str, tmp_path: Path) -> None:
    block = "microvm.ram" if machine == "microvm" else "pc.ram"
    there = save_guest(tmp_path, ["-M", machine, "-m", M], (block,))
    report, state = asyncio.run(restored_lazily(there, tmp_path / "out"))
    assert report.mode is Mode.LAZY
    assert report.run_state == "running"
    assert state.state == "completed"
    assert state.pages_left == 0
    assert not state.restarts


@pytest.mark.parametrize(
    "arguments",
    [backend("ram", share="on"), backend("memfd", share="on"), backend("memfd", share="off")],
    ids=["shared", "memfd", "private memfd"],
)
def test_memory_of_any_kind_is_filled_lazily(
    saved: Saved, arguments: list[str], tmp_path: Path
) -> None:
    _, state = asyncio.run(restored_lazily(saved, tmp_path / "out", *arguments))
    assert state.state == "completed"


def test_a_memory_file_on_a_tmpfs_is_filled_lazily(
    saved: Saved, shared_memory: Path, tmp_path: Path
) -> None:
    arguments = backend("file", share="on", mem_path=str(shared_memory / "ram"))
    _, state = asyncio.run(restored_lazily(saved, tmp_path / "out", *arguments))
    assert state.state == "completed"


def test_huge_pages_of_hugetlbfs_are_filled_lazily(saved: Saved, tmp_path: Path) -> None:
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if not free.exists() or int(free.read_text()) < RAM >> 21:
        pytest.skip(f"no {RAM >> 21} free huge pages")
    arguments = backend("memfd", hugetlb="on", hugetlbsize="2M", share="on")
    _, state = asyncio.run(restored_lazily(saved, tmp_path / "out", *arguments))
    assert state.state == "completed"


def test_a_memory_file_on_a_disk_is_refused_before_qemu_starts(
    saved: Saved, tmp_path: Path
) -> None:
    path = tmp_path / "ram"
    if shutil.disk_usage(tmp_path).free == 0 or _is_tmpfs(tmp_path):
        pytest.skip("the tests' directory is on a tmpfs")
    command = saved.command(*backend("file", share="on", mem_path=str(path)), serial=tmp_path / "o")
    with pytest.raises(
        NotSupported, match=r"no lazy restore: .*QEMU fills only memory files on tmpfs"
    ):
        asyncio.run(restore(saved.path, command, mode="lazy"))
    assert not path.exists()


def _is_tmpfs(path: Path) -> bool:
    device = os.stat(path).st_dev
    return device == os.stat("/dev/shm").st_dev


@pytest.mark.parametrize(
    ("options", "state"),
    [({}, "paused"), ({"paused": False}, "running")],
    ids=["as saved", "asked to run"],
)
def test_a_guest_that_was_saved_paused_stays_paused(
    options: dict[str, Any], state: str, tmp_path: Path
) -> None:
    there = save_guest(tmp_path, ["-M", "pc", "-m", M], paused=True)
    report, _ = asyncio.run(lazily_whole(there, tmp_path / "out", **options))
    assert report.run_state == state


def test_a_guest_that_ran_stays_paused_if_asked_for(saved: Saved, tmp_path: Path) -> None:
    report, state = asyncio.run(lazily_whole(saved, tmp_path / "out", paused=True))
    assert report.run_state == "paused"
    assert state.pages_left == 0


def test_every_block_is_as_it_was_saved(saved: Saved, tmp_path: Path) -> None:
    asyncio.run(lazily_whole(saved, tmp_path / "out", paused=True, compared=True))
