"""A guest that walks a working set scattered over its memory: how soon it has it after a restore.

The working set is runs of 64 KiB, as far apart as the memory allows, read in a scattered order:
neither the kernel's read-ahead nor the order of the file helps.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyqmigrate import open_snapshot
from pyqmigrate.qmp.client import QmpClient
from pyqmigrate.vm import sync
from pyqmigrate.vm.guest.ramblock import parse_ramblock
from tests.harness.freestanding import build_kernel
from tests.harness.machine import BINARY

__all__ = ["WalkSetup", "WalkingGuest", "restored", "save_base", "visited_in"]

_FIRST, _PROGRESS = 4 << 20, 3 << 20
_RUN = 64 << 10
_LIMIT, _LOW = 0xE0000000, 3 << 30  # machine pc: guests with that much RAM have 3 GiB below 4 GiB
_MIB = 1 << 20
_PATIENCE = 120.0  # seconds


@dataclass(frozen=True)
class WalkSetup:
    """A guest of ``ram`` bytes that reads ``working_set`` bytes of it."""

    ram: int
    working_set: int

    @property
    def runs(self) -> int:
        return self.working_set // _RUN

    @property
    def pages(self) -> int:
        return self.runs * (_RUN // 4096)

    def command(self, directory: Path, backend: str) -> list[str]:
        """The command line of its QEMU; its kernel is made in ``directory``."""
        apart = (self.ram - _FIRST) // self.runs // 4096 * 4096
        assert apart >= _RUN, "the working set does not fit"
        step = next(n for n in range(self.runs * 5 // 8, self.runs) if math.gcd(n, self.runs) == 1)
        constants = {
            "FIRST": f"{_FIRST}UL",
            "RUN_PAGES": f"{_RUN // 4096}",
            "RUNS": f"{self.runs}UL",
            "APART": f"{apart}UL",
            "STEP": f"{step}UL",
            "LOW_BYTES": f"{_LOW if self.ram >= _LIMIT else self.ram}UL",
        }
        kernel = build_kernel(directory, "walking_guest.c", constants, {".progress": _PROGRESS})
        machine = ["-machine", "pc,memory-backend=pc.ram", "-m", f"{self.ram >> 20}M"]
        memory = ["-object", f"{backend},id=pc.ram,size={self.ram}"]
        quiet = ["-nodefaults", "-no-user-config", "-display", "none"]
        return [BINARY, "-accel", "tcg", *quiet, *machine, *memory, "-kernel", str(kernel)]


class WalkingGuest:
    """A running guest, with a monitor at ``socket``."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self.process = process
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                with QmpClient.connect(socket) as qmp:
                    command = {"command-line": "info ramblock"}
                    table = qmp.execute("human-monitor-command", command)
                break
            except (FileNotFoundError, ConnectionError):
                assert process.poll() is None and time.monotonic() < deadline, "no monitor"
                time.sleep(0.002)
        blocks = parse_ramblock(table)
        self._ram = next(line.host_address for line in blocks if line.name == "pc.ram")

    def visited(self) -> int:
        """Pages that it has read since it was first started."""
        with Path(f"/proc/{self.process.pid}/mem").open("rb", buffering=0) as memory:
            return int(struct.unpack("<Q", os.pread(memory.fileno(), 8, self._ram + _PROGRESS))[0])

    def fill(self, size: int) -> None:
        """Write random bytes over its memory from its working set on: its content is not used."""
        random = np.random.default_rng(0)
        with Path(f"/proc/{self.process.pid}/mem").open("r+b", buffering=0) as memory:
            for offset in range(_FIRST, size, _MIB):
                os.pwrite(memory.fileno(), random.bytes(_MIB), self._ram + offset)

    def wait_until_visited(self, pages: int) -> None:
        deadline = time.monotonic() + _PATIENCE
        while self.visited() < pages:
            assert self.process.poll() is None and time.monotonic() < deadline, self.visited()
            time.sleep(0.002)


def save_base(setup: WalkSetup, path: Path) -> None:
    """Save such a guest, all of its memory written."""
    with _directory() as directory:
        socket = directory / "qmp"
        command = setup.command(directory, "memory-backend-memfd,share=on")
        command += ["-qmp", f"unix:{socket},server=on,wait=off"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
            try:
                guest = WalkingGuest(process, socket)
                guest.fill(setup.ram)
                guest.wait_until_visited(setup.pages)
                sync.connect(socket).save(path)
            finally:
                process.kill()


def visited_in(path: Path) -> int:
    """Pages that the guest in a snapshot has read."""
    with open_snapshot(path) as snapshot:
        return int(struct.unpack("<Q", snapshot.blocks["pc.ram"].read(_PROGRESS, 8))[0])


@contextlib.contextmanager
def restored(setup: WalkSetup, path: Path, **options: Any) -> Iterator[WalkingGuest]:
    """The guest, running again from ``path``; it ends on exit."""
    with _directory() as directory:
        socket = directory / "qmp"
        command = setup.command(directory, "memory-backend-ram")
        vm = sync.restore(
            path,
            command,
            mode="instant",
            paused=False,
            qmp=socket,
            stdin=subprocess.DEVNULL,
            **options,
        )
        try:
            yield WalkingGuest(vm.process, socket)
        finally:
            vm.process.kill()
            vm.process.wait()


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="walking-") as name:
        yield Path(name)
