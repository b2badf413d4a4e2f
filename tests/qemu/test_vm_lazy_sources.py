"""The pages of a lazy restore come from every kind of snapshot, and never from a damaged place."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyqmigrate
from pyqmigrate.errors import SnapshotError, UsageError
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.store.store import Store
from pyqmigrate.vm.incoming.lazy_state import LazyState
from pyqmigrate.vm.incoming.lazy_status import wait_for_memory
from pyqmigrate.vm.incoming.options import Mode
from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.incoming.restore import restore
from tests.harness.lazy_guests import children_of
from tests.harness.saved import RAM, Saved, goes_on, save_guest
from tests.harness.stored_guests import store_file

pytestmark = pytest.mark.qemu

_PATIENCE = 60.0


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_guest(tmp_path_factory.mktemp("pc"), ["-M", "pc", "-m", str(RAM >> 20)])


def _command(saved: Saved, serial: Path) -> list[str]:
    serial.unlink(missing_ok=True)
    return saved.command(serial=serial)


async def _whole(saved: Saved, snapshot: str, serial: Path, mode: str = "lazy") -> RestoredVm:
    vm = await restore(snapshot, _command(saved, serial), mode=mode)
    try:
        assert vm.report.mode is Mode.LAZY
        assert vm.lazy is not None
        await asyncio.wait_for(vm.lazy.completed(), _PATIENCE)
        await goes_on(saved, vm, serial)
        return vm
    finally:
        await vm.end()


@pytest.fixture
def stored(saved: Saved, tmp_path: Path) -> Iterator[str]:
    copy = tmp_path / "sealed"
    shutil.copyfile(saved.path, copy)
    pyqmigrate.seal(copy)
    with Store.create(tmp_path / "store") as store:
        yield store_file(store, copy, "monday")


def test_a_guest_goes_on_lazily_from_a_store(saved: Saved, stored: str, tmp_path: Path) -> None:
    asyncio.run(_whole(saved, stored, tmp_path / "out"))


def test_a_store_by_a_relative_path_is_found_by_the_server(
    saved: Saved, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asyncio.run(_whole(saved, os.path.relpath(stored), tmp_path / "out"))


def test_a_working_set_is_recorded_into_the_store_and_used(
    saved: Saved, stored: str, tmp_path: Path
) -> None:
    async def record() -> int:
        command = _command(saved, tmp_path / "out")
        vm = await restore(stored, command, mode="lazy", record=0.3)
        try:
            assert vm.recording is not None
            report = await asyncio.wait_for(vm.recording, _PATIENCE)
            assert str(report.path).endswith("working-sets/monday.ws")
            return report.pages
        finally:
            await vm.end()

    assert asyncio.run(record()) > 100
    assert (tmp_path / "store" / "working-sets" / "monday.ws").exists()
    vm = asyncio.run(_whole(saved, stored, tmp_path / "out"))
    assert not any("working set" in note for note in vm.report.notes)


def test_a_lazy_restore_mounts_nothing(saved: Saved, stored: str, tmp_path: Path) -> None:
    async def run() -> None:
        vm = await restore(stored, _command(saved, tmp_path / "out"), mode="lazy")
        try:
            assert vm.lazy is not None
            children = set(children_of(os.getpid()))
            assert children == {vm.process.pid, vm.lazy.process.pid}
            await asyncio.wait_for(vm.lazy.completed(), _PATIENCE)
        finally:
            await vm.end()

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["auto", pytest.param("lazy", marks=pytest.mark.long)])
def test_a_sequential_stream_is_restored_lazily(saved: Saved, mode: str, tmp_path: Path) -> None:
    stream = tmp_path / "guest.stream"
    pyqmigrate.convert(saved.path, stream, to="stream")
    asyncio.run(_whole(saved, str(stream), tmp_path / "out", mode))


def test_the_file_may_be_replaced_while_pages_are_missing(saved: Saved, tmp_path: Path) -> None:
    from tests.harness.lazy_guests import kill_server

    snapshot = tmp_path / "snapshot"
    shutil.copyfile(saved.path, snapshot)

    async def run() -> None:
        vm = await restore(snapshot, _command(saved, tmp_path / "out"), mode="lazy")
        assert vm.lazy is not None
        try:
            other = tmp_path / "other"
            other.write_bytes(b"not a snapshot")
            other.replace(snapshot)
            assert kill_server(vm)
            state = await asyncio.wait_for(vm.lazy.completed(), _PATIENCE)
            assert state.restarts == 1
            await goes_on(saved, vm, tmp_path / "out")
        finally:
            await vm.end()

    asyncio.run(run())


@pytest.fixture
def damaged(saved: Saved, tmp_path: Path) -> Path:
    """A sealed copy of the snapshot, with another byte in a page of the guest's memory."""
    copy = tmp_path / "damaged"
    shutil.copyfile(saved.path, copy)
    pyqmigrate.seal(copy)
    with pyqmigrate.open_snapshot(copy) as snapshot:
        assert isinstance(snapshot, MappedRamSnapshot)
        block = snapshot.blocks["pc.ram"]
        page = next(first for first, _, data in block.runs(2000) if data)
        offset = block.pages_offset + page * block.page_size + 17
    with copy.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    return copy


async def _until_damaged(vm: RestoredVm) -> LazyState:
    assert vm.lazy is not None
    async with asyncio.timeout(_PATIENCE):
        while not vm.lazy.state.damages:
            await vm.lazy.changed()
    return vm.lazy.state


def test_a_damaged_page_is_named_and_the_guest_goes_on_from_a_good_copy(
    saved: Saved, damaged: Path, tmp_path: Path
) -> None:
    async def run() -> None:
        vm = await restore(damaged, _command(saved, tmp_path / "out"), mode="lazy")
        assert vm.lazy is not None
        try:
            state = await _until_damaged(vm)
            assert {damage.block for damage in state.damages} == {"pc.ram"}
            assert "'pc.ram'" in str(state.damages[0])
            assert "not as it was sealed" in str(state.damages[0])
            answer = await vm.monitor.execute("query-migrate")
            assert answer["status"] == "postcopy-active"
            with pytest.raises(SnapshotError):
                await wait_for_memory(vm.process.pid, resume=__file__)
            done = await asyncio.wait_for(
                wait_for_memory(vm.process.pid, resume=saved.path), _PATIENCE
            )
            assert done.pages_left == 0
            assert not done.damages
            await goes_on(saved, vm, tmp_path / "out")
        finally:
            await vm.end()

    asyncio.run(run())


def test_another_snapshot_is_not_taken_for_a_copy(
    saved: Saved, damaged: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = save_guest(tmp_path / "elsewhere", ["-M", "pc", "-m", str(RAM >> 20)])

    async def run() -> None:
        vm = await restore(damaged, _command(saved, tmp_path / "out"), mode="lazy")
        assert vm.lazy is not None
        try:
            await _until_damaged(vm)
            wrong = asyncio.create_task(wait_for_memory(vm.process.pid, resume=other.path))
            async with asyncio.timeout(_PATIENCE):
                while not vm.lazy.state.warnings:
                    await vm.lazy.changed()
            assert "is not a copy of the snapshot" in vm.lazy.state.warnings[0]
            await asyncio.wait_for(wait_for_memory(vm.process.pid, resume=saved.path), _PATIENCE)
            await wrong
            await goes_on(saved, vm, tmp_path / "out")
        finally:
            await vm.end()

    asyncio.run(run())


def test_vm_restore_names_the_page_and_vm_wait_goes_on(
    saved: Saved, damaged: Path, tmp_path: Path
) -> None:
    import json
    import time

    vm = [sys.executable, "-m", "pyqmigrate", "vm"]
    command = _command(saved, tmp_path / "out")
    with (
        (tmp_path / "errors").open("w+") as errors,
        subprocess.Popen(
            [*vm, "restore", "--json", "--mode", "lazy", str(damaged), "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as restoring,
    ):
        try:
            assert restoring.stdout is not None
            lines = ""
            while not lines.endswith("}\n") or lines.count("{") > lines.count("}"):
                line = restoring.stdout.readline()
                assert line, (tmp_path / "errors").read_text()
                lines += line
            report = json.loads(lines)
            assert report["mode"] == "lazy"
            assert report["lazy"]["pages_left"] > 0
            deadline = time.monotonic() + _PATIENCE
            while "not as it was sealed" not in (said := (tmp_path / "errors").read_text()):
                assert time.monotonic() < deadline, said
                time.sleep(0.05)
            assert f"vm wait {report['pid']} --resume" in said
            waiting = subprocess.run(
                [*vm, "wait", str(report["pid"]), "--resume", str(saved.path), "--json"],
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
            )
            assert waiting.returncode == 0, waiting.stderr
            assert json.loads(waiting.stdout)["pages_left"] == 0
        finally:
            restoring.terminate()
            restoring.wait(_PATIENCE)


def test_there_is_nothing_to_resume_without_a_lazy_restore(saved: Saved) -> None:
    with pytest.raises(UsageError, match="nothing to resume"):
        asyncio.run(wait_for_memory(os.getpid(), resume=saved.path))
