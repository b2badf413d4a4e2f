"""A guest goes on from a snapshot of a store: QEMU runs from a private mount of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyqmigrate
from pyqmigrate import vm
from pyqmigrate.errors import SnapshotError, UsageError
from pyqmigrate.format.store.keys import pack_key, snapshot_key
from pyqmigrate.io.input import InputFile
from pyqmigrate.mount.view import MountedView
from pyqmigrate.store.store import Store
from pyqmigrate.vm.incoming.report import RestoredVm
from tests.harness.command import COMMAND
from tests.harness.covering import covering
from tests.harness.mounted_guests import PATIENCE, keepers, worker_of
from tests.harness.stored_guests import store_file
from tests.harness.walking_guest import WalkingGuest

pytestmark = pytest.mark.qemu

MIB = 1 << 20


@pytest.fixture(scope="module")
def guest(module_disk: Path) -> WalkingGuest:
    """A guest that walks over 4 MiB and notices a wrong page."""
    guest = WalkingGuest(module_disk, 4 * MIB, cluster=16, spread=32)
    guest.save()
    pyqmigrate.seal(guest.path)
    return guest


@pytest.fixture(scope="module")
def store(guest: WalkingGuest, module_disk: Path) -> Iterator[Store]:
    with Store.create(module_disk / "store") as store:
        store_file(store, guest.path, "monday")
        yield store


@pytest.fixture
def stored(
    guest: WalkingGuest, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The name of the snapshot, from which the guest is restored; nothing of the mount is left."""
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    guest.name = f"{store.name}#monday"
    yield guest.name
    guest.name = guest.path
    deadline = time.monotonic() + PATIENCE
    while os.listdir(runtime) or keepers(runtime):
        assert time.monotonic() < deadline, (os.listdir(runtime), keepers(runtime))
        time.sleep(0.05)
    assert str(runtime) not in Path("/proc/mounts").read_text()


async def restored(guest: WalkingGuest, mode: str = "instant") -> RestoredVm:
    return await vm.restore(
        str(guest.name), guest.command, mode=mode, stdin=subprocess.DEVNULL, paused=False
    )


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_guest_goes_on(guest: WalkingGuest, stored: str, mode: str) -> None:
    async def run() -> None:
        running = await restored(guest, mode)
        try:
            assert running.report.mode == mode
            if mode == "instant":
                assert any("sealed" in note for note in running.report.notes)
            await guest._walk(running.monitor, running.process.pid, guest.npages)
        finally:
            await running.end()

    asyncio.run(run())


def test_no_name_of_the_mount_is_there_while_the_guest_runs(
    guest: WalkingGuest, stored: str, tmp_path: Path
) -> None:
    async def run() -> None:
        running = await restored(guest)
        try:
            assert os.listdir(tmp_path / "runtime") == []
            assert str(tmp_path) not in Path("/proc/mounts").read_text()
            assert keepers(tmp_path / "runtime")
        finally:
            await running.end()

    asyncio.run(run())


@pytest.mark.parametrize("kills", covering([5, 50], short=[5]))
def test_guest_survives_the_death_of_workers(guest: WalkingGuest, stored: str, kills: int) -> None:
    async def run() -> None:
        with contextlib.closing(InputFile(stored)) as source:
            running = await restored(guest)
            killed = set()
            try:
                walking = asyncio.create_task(
                    guest._walk(running.monitor, running.process.pid, guest.npages)
                )
                while len(killed) < kills:
                    worker = await asyncio.to_thread(worker_of, source)
                    with contextlib.suppress(ProcessLookupError):  # the one before
                        os.kill(worker, signal.SIGKILL)
                        killed.add(worker)
                    # What is cached would need no worker.
                    os.posix_fadvise(source.fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    await asyncio.sleep(0.02)
                await walking
                assert source.read_at(0, 4) == b"QEVM"
            finally:
                await running.end()

    asyncio.run(run())


@pytest.fixture(scope="module")
def damaged(guest: WalkingGuest, module_disk: Path) -> tuple[str, str]:
    """A stored snapshot with a damaged frame, and the digest of the pack that has it."""
    with Store.create(module_disk / "damaged") as store:
        name = store_file(store, guest.path, "monday", pack_pages=100)
        packs = store.read_snapshot("monday").packs
        digest = packs[len(packs) // 2]
        pack = module_disk / "damaged" / pack_key(digest)
        content = bytearray(pack.read_bytes())
        content[40] ^= 1  # of the first frame
        pack.chmod(0o600)
        pack.write_bytes(content)
    return name, digest.hex()


def test_damaged_frame_is_an_error_and_never_a_wrong_page(
    guest: WalkingGuest, damaged: tuple[str, str], stored: str
) -> None:
    name, pack = damaged
    with contextlib.closing(InputFile(name)) as source, guest.path.open("rb") as plain:
        assert source.view is not None
        view = source.view.view
        assert isinstance(view, MountedView)
        failed = 0
        for offset in range(0, source.size, 64 << 10):
            try:
                shown = os.pread(source.fd, 64 << 10, offset)
            except OSError:
                failed += 1
            else:
                assert shown == os.pread(plain.fileno(), len(shown), offset)
        assert failed
        messages = view.messages()
        assert any("monday" in text and pack in text and "page" in text for text in messages)


def test_error_of_a_damaged_frame_names_it(damaged: tuple[str, str], stored: str) -> None:
    name, pack = damaged
    ran = subprocess.run([*COMMAND, "verify", name], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert f"pack {pack}" in ran.stderr
    assert "monday" in ran.stderr


def test_guest_that_needs_a_damaged_page_ends_with_a_message(
    guest: WalkingGuest, damaged: tuple[str, str], stored: str
) -> None:
    name, pack = damaged
    command = [*COMMAND, "vm", "restore", "--running", name, "--", *guest.command]
    ran = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 4
    assert f"pack {pack}" in ran.stderr
    assert "QEMU was killed by signal 7" in ran.stderr


@pytest.mark.parametrize("count", covering([3, 10], short=[3]))
def test_clones_share_the_page_cache(
    guest: WalkingGuest, stored: str, tmp_path: Path, count: int
) -> None:
    plain = clones_pss(guest, guest.path, tmp_path, count)
    shown = clones_pss(guest, stored, tmp_path, count)
    assert shown < 1.05 * plain + 8 * MIB


def clones_pss(guest: WalkingGuest, name: str | Path, tmp_path: Path, count: int) -> int:
    """Return the memory of ``count`` clones that have walked, in bytes."""

    async def run() -> int:
        clones = await vm.clone(
            name, guest.command, count, directory=tmp_path / "qmp", paused=False
        )
        running = [clone.vm for clone in clones if clone.vm is not None]
        try:
            assert len(running) == count
            for one in running:
                await guest._walk(one.monitor, one.process.pid, guest.npages)
            return sum(map(pss_of, (one.process.pid for one in running)))
        finally:
            await asyncio.gather(*(one.end() for one in running))

    return asyncio.run(run())


def pss_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10


def test_what_is_read_is_recorded_in_the_store_and_comes_first(
    guest: WalkingGuest, stored: str, store: Store
) -> None:
    report = guest.record(1.5)
    assert str(report.path) == f"{store.name}/working-sets/monday.ws"
    try:
        with contextlib.closing(InputFile(stored)):
            _, restored_report = guest.seconds_to_walk()
        assert restored_report.recorded_pages == report.pages > 0
        assert not any("working set" in note for note in restored_report.notes)
    finally:
        Path(store.name, "working-sets", "monday.ws").unlink()


def test_missing_snapshot_is_named(store: Store, stored: str) -> None:
    with pytest.raises(UsageError, match=r"there is no snapshot 'tuesday' in .*store"):
        InputFile(f"{store.name}#tuesday")


def test_damaged_document_is_named(guest: WalkingGuest, module_disk: Path, stored: str) -> None:
    with Store.create(module_disk / "cut") as store:
        name = store_file(store, guest.path, "monday")
    document = module_disk / "cut" / snapshot_key("monday")
    document.chmod(0o600)
    document.write_bytes(document.read_bytes()[:-1])
    with pytest.raises(SnapshotError, match="monday"):
        InputFile(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="starts QEMU as another user")
def test_qemu_of_another_user_runs_from_it(guest: WalkingGuest, stored: str) -> None:
    guest.path.parent.chmod(0o711)  # its kernel is there
    other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]

    async def run() -> None:
        running = await vm.restore(
            stored, [*other, *guest.command], mode="instant", stdin=subprocess.DEVNULL, paused=False
        )
        try:
            status = Path(f"/proc/{running.process.pid}/status").read_text()
            assert "Uid:\t65534" in status
            await guest._walk(running.monitor, running.process.pid, guest.npages)
        finally:
            await running.end()

    asyncio.run(run())
