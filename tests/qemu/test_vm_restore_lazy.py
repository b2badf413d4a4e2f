"""A guest runs before its memory is there, and has all of it in the end."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.vm.incoming import lazy_checks
from pyqmigrate.vm.incoming.clone import clone
from pyqmigrate.vm.incoming.options import Mode
from pyqmigrate.vm.incoming.restore import restore
from tests.harness.huge_pages import huge_pages
from tests.harness.lazy_guests import lazily_whole, restored_lazily
from tests.harness.saved import RAM, Saved, goes_on, save_guest

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
    [
        pytest.param(backend("ram", share="on"), marks=pytest.mark.long),
        backend("memfd", share="on"),
        pytest.param(backend("memfd", share="off"), marks=pytest.mark.long),
    ],
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
    with huge_pages(RAM):
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


def test_auto_is_lazy_where_memory_must_be_shared(saved: Saved, tmp_path: Path) -> None:
    async def run() -> str:
        command = [
            *saved.command(*backend("memfd", share="on"), serial=tmp_path / "out"),
            *("-chardev", "null,id=vhost-user"),  # a word that keeps memory from being mapped
        ]
        vm = await restore(saved.path, command)
        try:
            assert vm.lazy is not None
            await vm.lazy.completed()
            assert vm.report.mode is Mode.LAZY
            return vm.report.why
        finally:
            await vm.end()

    assert "vhost-user needs shared memory" in asyncio.run(run())


def test_what_a_guest_asks_for_is_recorded_and_sent_first_later(
    saved: Saved, tmp_path: Path
) -> None:
    path = tmp_path / "recorded"

    async def record() -> int:
        command = saved.command(serial=tmp_path / "out")
        vm = await restore(saved.path, command, mode="lazy", record=0.5, working_set=path)
        try:
            assert vm.recording is not None
            report = await asyncio.wait_for(vm.recording, 60)
            assert report.path == path
            return report.pages
        finally:
            await vm.end()

    assert asyncio.run(record()) > 100
    (tmp_path / "out").unlink()
    _, state = asyncio.run(restored_lazily(saved, tmp_path / "out", working_set=path))
    assert state.state == "completed"


def test_a_working_set_of_another_snapshot_beside_it_is_not_used(
    saved: Saved, tmp_path: Path
) -> None:
    copy = dataclasses.replace(saved, path=tmp_path / "copy")
    shutil.copyfile(saved.path, copy.path)
    (tmp_path / "copy.workingset").write_bytes(b"no working set")
    report, _ = asyncio.run(restored_lazily(copy, tmp_path / "out"))
    assert any("working set is not used" in note for note in report.notes)


def test_a_recording_that_could_not_end_is_refused(saved: Saved, tmp_path: Path) -> None:
    command = saved.command(serial=tmp_path / "out")
    with pytest.raises(UsageError, match="push never"):
        asyncio.run(restore(saved.path, command, mode="lazy", record=1, push="never"))


def test_huge_pages_are_made_at_the_end(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root may ask for huge pages of another process")
    there = save_guest(tmp_path, ["-M", "pc", "-m", M])
    _, state = asyncio.run(lazily_whole(there, tmp_path / "out", huge_pages=True, compared=False))
    assert state.huge > 0 or state.warnings
    assert state.huge % (2 << 20) == 0


def test_clones_are_restored_lazily(saved: Saved, tmp_path: Path) -> None:
    async def run() -> list[str]:
        command = saved.command(serial=tmp_path / "out{n}")
        clones = await clone(saved.path, command, 2, directory=tmp_path, mode="lazy")
        try:
            for made in clones:
                assert made.vm is not None, made.error
                assert made.vm.lazy is not None
                await made.vm.lazy.completed()
                await goes_on(saved, made.vm, tmp_path / f"out{made.number}")
            return [str(made.vm.report.mode) for made in clones if made.vm is not None]
        finally:
            for made in clones:
                if made.vm is not None:
                    await made.vm.end()

    assert asyncio.run(run()) == ["lazy", "lazy"]


def test_a_user_without_userfaultfd_is_told_what_to_do(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_checks, "_DEVICE", str(tmp_path / "none"))
    monkeypatch.setattr(lazy_checks, "_CAP_SYS_PTRACE", 63)
    command = saved.command(serial=tmp_path / "out")
    with pytest.raises(NotSupported, match="may not use userfaultfd: make"):
        asyncio.run(restore(saved.path, command, mode="lazy"))
