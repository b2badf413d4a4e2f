"""Sealed saves of a running QEMU, and restores that believe the seal."""

from __future__ import annotations

import asyncio
import fcntl
from pathlib import Path

import pytest

from pyqmigrate import open_snapshot, seal, verify_seal
from pyqmigrate.errors import TargetError
from pyqmigrate.integrity.digests import Digests
from pyqmigrate.integrity.seal import stale_pages
from pyqmigrate.integrity.verify import current_seal
from pyqmigrate.vm.incoming.restore import restore
from tests.harness.compare_memory import assert_same_blocks
from tests.harness.pattern_guest import check_pattern
from tests.harness.saved import Saved, memory_of, save_guest
from tests.harness.saving import loaded, source

pytestmark = pytest.mark.qemu

MIB = 1 << 20
ARGUMENTS = ["-M", "pc", "-m", "24"]


def check(path: Path) -> None:
    found = verify_seal(path)
    assert found is not None
    assert (found.damages, found.clear_pages_zero) == ((), True)
    assert current_seal(path) is not None


@pytest.mark.parametrize(
    ("engine", "live", "memory"),
    [
        ("direct", False, "file"),
        ("direct", False, "private"),
        ("qemu", False, "memfd"),
        ("qemu", "converge", "file"),
    ],
)
def test_save_with_a_seal_is_intact_and_loads(
    engine: str, live: bool | str, memory: str, disk: Path
) -> None:
    path = disk / "snapshot"
    with source(disk, memory=memory) as guest:
        report = guest.save(path, engine=engine, live=live, seal="xxh3-128")
        assert (report.engine, report.seal) == (engine, "xxh3-128")
        guest.files |= {"snapshot", "snapshot.seal"}
        guest.assert_as_before()
        check(path)
        with loaded(guest, path) as other:
            check_pattern(bytes(other.ram.memory[:]))


def test_engine_direct_does_not_read_the_pages_again(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Digests] = []
    whole = Digests.read_rest

    def read_rest(self: Digests, *arguments: object) -> None:
        whole(self, *arguments)  # type: ignore[arg-type]
        found.append(self)

    monkeypatch.setattr(Digests, "read_rest", read_rest)
    with source(disk, memory="file") as guest:
        guest.save(disk / "snapshot", engine="direct", seal="sha256")
    [digests] = found
    with open_snapshot(disk / "snapshot") as snapshot:
        data = sum(block.data_pages for block in snapshot.blocks.values()) * 4096
        assert digests.bytes_read <= (2 * len(snapshot.blocks) + 2) * MIB < data


def test_save_over_a_sealed_snapshot_removes_its_seal(disk: Path) -> None:
    path = disk / "snapshot"
    with source(disk, memory="file") as guest:
        guest.save(path, engine="direct", seal="xxh3-128")
        assert (disk / "snapshot.seal").exists()
        guest.save(path, engine="qemu")
        assert not (disk / "snapshot.seal").exists()


def dirty(saved: Saved) -> int:
    """Old bytes under every clear bit; under how many."""
    with open_snapshot(saved.path) as snapshot, saved.path.open("r+b") as file:
        block = snapshot.blocks["pc.ram"]
        clear = [page for page in range(block.num_pages) if not block.bitmap[page]]
        for page in clear:
            file.seek(block.pages_offset + page * block.page_size)
            file.write(b"\xee" * block.page_size)
    return len(clear)


def test_restore_believes_the_seal_and_says_so(disk: Path) -> None:
    saved = save_guest(disk, ARGUMENTS)
    stale = dirty(saved)
    assert stale > 1000
    assert seal(saved.path).cleared_pages == stale

    async def run() -> None:
        serial = disk / "other"
        vm = await restore(saved.path, saved.command(serial=serial), mode="instant", paused=True)
        try:
            assert vm.report.stale_pages == 0
            assert any("sealed" in note for note in vm.report.notes)
            assert_same_blocks(await memory_of(vm.monitor, vm.process.pid), saved.memory)
            # It runs from the file now.
            await asyncio.to_thread(seal, saved.path)
            dirty(saved)
            with pytest.raises(TargetError, match="a guest runs from it"):
                await asyncio.to_thread(seal, saved.path)
        finally:
            await vm.end()

    asyncio.run(run())
    with open_snapshot(saved.path) as snapshot:
        assert stale_pages(snapshot) == {"pc.ram": stale}


def test_restore_does_not_believe_the_seal_of_a_file_that_was_touched(disk: Path) -> None:
    saved = save_guest(disk, ARGUMENTS)
    seal(saved.path)
    stale = dirty(saved)

    async def run() -> None:
        serial = disk / "other"
        vm = await restore(saved.path, saved.command(serial=serial), mode="instant", paused=True)
        try:
            assert vm.report.stale_pages == stale
            assert not any("sealed" in note for note in vm.report.notes)
            assert_same_blocks(await memory_of(vm.monitor, vm.process.pid), saved.memory)
        finally:
            await vm.end()

    asyncio.run(run())


def test_lock_of_a_guest_is_a_shared_one(disk: Path) -> None:
    """What the refusal above rests on: others may share the file, and nobody may change it."""
    saved = save_guest(disk, ARGUMENTS)

    async def run() -> None:
        vm = await restore(
            saved.path, saved.command(serial=disk / "other"), mode="instant", paused=True
        )
        try:
            with saved.path.open("rb") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
                with pytest.raises(BlockingIOError):
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            await vm.end()

    asyncio.run(run())
