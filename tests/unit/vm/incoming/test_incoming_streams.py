"""Incoming streams that several guests share, or for which no task waits any more."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import threading
from pathlib import Path

import numpy as np
import pytest

import pyqmigrate
from pyqmigrate.errors import Cancelled
from pyqmigrate.vm.incoming.incoming_stream import IncomingStream
from pyqmigrate.vm.incoming.incoming_streams import IncomingStreams
from pyqmigrate.vm.incoming.source import RestoreSource

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "guest.mapped"
    pyqmigrate.save(path, [pyqmigrate.RamBlock("pc.ram", np.zeros(2 * MIB, dtype=np.uint8))])
    return path


@pytest.mark.usefixtures("same_descriptors")
def test_stream_that_no_process_waits_for_ends_in_silence(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cancelled = threading.Event()

    def build(_: IncomingStream) -> None:
        assert cancelled.wait(10)
        raise Cancelled("cancelled")

    monkeypatch.setattr(IncomingStream, "build", build)
    monkeypatch.setattr(IncomingStream, "cancel", lambda _: cancelled.set())

    async def run() -> None:
        async with await IncomingStreams.open(path, None) as streams:
            waiting = asyncio.create_task(streams.get(["pc.ram"]))
            await asyncio.sleep(0.05)
            waiting.cancel()

    asyncio.run(run())
    gc.collect()
    assert not [r for r in caplog.records if r.name == "asyncio"]


@pytest.mark.usefixtures("same_descriptors")
def test_snapshot_that_is_being_opened_is_closed_when_that_is_cancelled(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its lock would remain until this process ends."""
    cancelled = threading.Event()
    really_lock = RestoreSource._lock

    def lock(source: RestoreSource) -> None:
        assert cancelled.wait(10)
        really_lock(source)

    monkeypatch.setattr(RestoreSource, "_lock", lock)

    async def run() -> None:
        opening = asyncio.create_task(IncomingStreams.open(path, None))
        await asyncio.sleep(0.05)
        opening.cancel()
        asyncio.get_running_loop().call_later(0.05, cancelled.set)
        with pytest.raises(asyncio.CancelledError):
            await opening

    gc.disable()  # a leaked descriptor must not be closed by the collector
    try:
        asyncio.run(run())
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        gc.enable()
