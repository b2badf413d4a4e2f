"""The snapshot that guests are restored from, while it is opened and left."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

import pyqmigrate
from pyqmigrate.errors import Cancelled, TargetError
from pyqmigrate.io.target import Descriptors
from pyqmigrate.vm.companion import Companion
from pyqmigrate.vm.source import Source

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "guest.mapped"
    pyqmigrate.save(path, [pyqmigrate.RamBlock("pc.ram", np.zeros(2 * MIB, dtype=np.uint8))])
    return path


@pytest.mark.usefixtures("same_descriptors")
def test_companion_that_nobody_waits_for_ends_in_silence(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cancelled = threading.Event()

    def build(_: Companion) -> None:
        assert cancelled.wait(10)
        raise Cancelled("cancelled")

    monkeypatch.setattr(Companion, "build", build)
    monkeypatch.setattr(Companion, "cancel", lambda _: cancelled.set())

    async def run() -> None:
        async with await Source.open(path, None) as source:
            waiting = asyncio.create_task(source.companion(["pc.ram"]))
            await asyncio.sleep(0.05)
            waiting.cancel()

    asyncio.run(run())
    gc.collect()
    assert not [r for r in caplog.records if r.name == "asyncio"]


@pytest.mark.usefixtures("same_descriptors")
def test_snapshot_that_is_being_opened_is_closed_when_that_is_cancelled(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock would stay for as long as this process does."""
    cancelled = threading.Event()
    really_lock = Source._lock

    def lock(source: Source) -> None:
        assert cancelled.wait(10)
        really_lock(source)

    monkeypatch.setattr(Source, "_lock", lock)

    async def run() -> None:
        opening = asyncio.create_task(Source.open(path, None))
        await asyncio.sleep(0.05)
        opening.cancel()
        asyncio.get_running_loop().call_later(0.05, cancelled.set)
        with pytest.raises(asyncio.CancelledError):
            await opening

    gc.disable()  # what is lost must not be found by chance
    try:
        asyncio.run(run())
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        gc.enable()


def test_lock_of_the_callers_descriptor_stays_what_it_is(path: Path) -> None:
    async def run(fd: int) -> None:
        async with await Source.open(Descriptors(fd), None):
            pass

    with path.open("rb") as caller, path.open("rb") as other:
        fcntl.flock(caller, fcntl.LOCK_EX)
        with pytest.raises(TargetError, match="writes the snapshot in place"):
            asyncio.run(run(caller.fileno()))
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_descriptor_that_can_only_be_duplicated_keeps_its_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def refuse(name: str, *arguments: int, **options: int) -> int:
        if str(name).startswith("/proc/self/fd/"):
            raise PermissionError(13, "Permission denied", name)
        return really_open(name, *arguments, **options)

    async def run(fd: int) -> None:
        async with await Source.open(Descriptors(fd), None):
            with path.open("rb") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)

    with path.open("rb") as caller:
        fcntl.flock(caller, fcntl.LOCK_EX)
        monkeypatch.setattr(os, "open", refuse)
        asyncio.run(run(caller.fileno()))
