"""A guest that walks over its memory in a scattered order: what a restore from a cold file costs.

guest = WalkingGuest(directory, working_set=300 << 20)
guest.save()
print(guest.seconds_to_walk())          # restored from a cold file, until all of it was read
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

from pyqmigrate import vm
from pyqmigrate.io.page_cache import drop_cached
from pyqmigrate.vm.guest.ramblock import parse_ramblock
from pyqmigrate.vm.incoming.recording import WorkingSetReport
from pyqmigrate.vm.incoming.report import RestoredVm, RestoreReport
from tests.harness.bare import BareQemu
from tests.harness.freestanding import build_kernel
from tests.harness.machine import BINARY
from tests.harness.saved import migrate

__all__ = ["WalkingGuest"]

PAGE = 4096
BLOCK = "pc.ram"
_PROGRESS = 3 << 20
_FIRST = 16 << 20
_STRIDE = 7919  # pages, a prime
_PATIENCE = 120.0  # seconds


class WalkingGuest:
    """Walks over ``working_set`` bytes of its memory; its snapshot is ``path``.

    They are in clusters of ``cluster`` pages, one in each ``spread`` pages. ``name`` is what it is
    restored from: its snapshot, or another name of it, in ``mode``.
    """

    def __init__(
        self, directory: Path, working_set: int, *, cluster: int = 16, spread: int = 64
    ) -> None:
        self.npages = working_set // PAGE
        assert self.npages % _STRIDE, "the walk would not visit all pages"
        self.path = directory / "walking.mapped"
        self.name: str | Path = self.path
        self.mode = "instant"
        constants = {
            "FIRST": f"{_FIRST}UL",
            "PAGES": f"{self.npages}UL",
            "STRIDE": f"{_STRIDE}UL",
            "CLUSTER": f"{cluster}UL",
            "SPREAD": f"{spread}UL",
        }
        ram = _FIRST + working_set // cluster * spread + (16 << 20)
        kernel = build_kernel(directory, "walking_guest.c", constants, {".progress": _PROGRESS})
        self._machine = ["-M", "pc", "-m", str(ram >> 20), "-kernel", str(kernel)]

    @property
    def command(self) -> list[str]:
        """Its command line, for a restore."""
        return [BINARY, "-accel", "tcg", "-nodefaults", "-display", "none", *self._machine]

    def save(self) -> None:
        """Start the guest, and save it while it walks."""
        with BareQemu(*self._machine, run=True) as qemu:
            qemu.run(lambda monitor: self._save(monitor, qemu.process.pid))

    async def _save(self, monitor: Any, pid: int) -> None:
        await self._walk(monitor, pid, 1000)
        await monitor.execute("stop")
        await migrate(monitor, f"file:{self.path}")

    def forget(self) -> None:
        """Drop the snapshot from the page cache."""
        with self.path.open("r+b") as file:
            drop_cached(file.fileno())

    def seconds_to_walk(self, **options: Any) -> tuple[float, RestoreReport]:
        """Restore from a cold file; return the seconds until all pages were visited once."""
        self.forget()
        return asyncio.run(self._restore(options))

    def record(self, seconds: float) -> WorkingSetReport:
        """Restore, and record what the guest touches."""

        async def run() -> WorkingSetReport:
            guest = await self._restored({"record": seconds})
            try:
                assert guest.recording is not None
                return await guest.recording
            finally:
                await guest.end()

        return asyncio.run(run())

    async def _restored(self, options: dict[str, Any]) -> RestoredVm:
        return await vm.restore(
            self.name,
            self.command,
            mode=self.mode,
            stdin=subprocess.DEVNULL,
            paused=False,
            **options,
        )

    async def _restore(self, options: dict[str, Any]) -> tuple[float, RestoreReport]:
        started_at = time.monotonic()
        guest = await self._restored(options)
        try:
            await self._walk(guest.monitor, guest.process.pid, self.npages)
            return time.monotonic() - started_at, guest.report
        finally:
            await guest.end()

    async def _walk(self, monitor: Any, pid: int, npages: int) -> None:
        """Wait until ``npages`` more were visited; AssertionError if one was wrong."""
        table = parse_ramblock(await monitor.hmp("info ramblock"))
        address = next(line.host_address for line in table if line.name == BLOCK)
        deadline = time.monotonic() + _PATIENCE
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:

            def progress() -> tuple[int, int]:
                while True:
                    with contextlib.suppress(OSError):  # the page is missing, in mode lazy
                        data = os.pread(memory.fileno(), 16, address + _PROGRESS)
                        visited, wrong = struct.unpack("<QQ", data)
                        return visited, wrong
                    assert time.monotonic() < deadline, "the guest does not run"

            first, _ = progress()
            while progress()[0] < first + npages:
                assert time.monotonic() < deadline, "the guest does not walk"
                await asyncio.sleep(0.002)
            assert progress()[1] == 0, "the guest found a wrong page"
