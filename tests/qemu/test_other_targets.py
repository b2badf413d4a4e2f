"""Guests that are no PC: flash, other byte orders, sections that a PC does not have."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pyqmigrate import open_snapshot
from pyqmigrate.qmp.client import QmpClient
from pyqmigrate.vm.incoming.lazy_status import wait_for_memory
from tests.harness.compare_memory import assert_same_memory
from tests.harness.machine import GuestRam
from tests.harness.other_targets import TARGETS, OtherQemu, OtherTarget, memory_of
from tests.harness.verbs import restored, save

pytestmark = pytest.mark.qemu

MODES = ["instant", "load", "lazy"]
WRITES_RAM = "pseries"  # its device tree, at every start


@pytest.fixture(
    params=[
        pytest.param(name, marks=[] if name in ("aarch64", "ppc64") else [pytest.mark.long])
        for name in TARGETS
    ]
)
def target(request: pytest.FixtureRequest) -> OtherTarget:
    return TARGETS[request.param]


@pytest.fixture
def ram(target: OtherTarget) -> Iterator[GuestRam]:
    """Random pages, single and in runs, in RAM that is zero otherwise."""
    rng = np.random.default_rng(target.length)
    with GuestRam(target.length) as ram:
        for start in rng.integers(0, target.length // 4096 - 16, 200):
            length = int(rng.integers(1, 16)) * 4096
            ram.memory[start * 4096 : start * 4096 + length] = rng.bytes(length)
        yield ram


@contextlib.contextmanager
def again(
    target: OtherTarget, snapshot: Path, directory: Path, *options: str
) -> Iterator[tuple[str, bytes]]:
    """Restores it paused: the mode, and what its RAM is."""
    socket = directory / "again"
    words = ["--paused", "--qmp", str(socket), *options]
    command = target.command("ram")
    with restored(snapshot, command, *words) as report, QmpClient.connect(socket) as qmp:
        asyncio.run(wait_for_memory(report["pid"]))
        yield report["mode"], memory_of(qmp, report["pid"], target.block)


@pytest.mark.parametrize("channels", [0, 2])
def test_guest_that_qemu_saved_is_read_and_restored(
    target: OtherTarget, ram: GuestRam, disk: Path, channels: int
) -> None:
    """Restored in every mode; with multifd the file is only read."""
    path = disk / "snapshot"
    with OtherQemu(target, ram) as qemu:
        qemu.save(path, **({"multifd-channels": channels} if channels else {}))
        expected = bytes(ram.memory)
    with open_snapshot(path) as snapshot:
        assert target.machine in snapshot.machine
        memory = snapshot.blocks[target.block].read(0, target.length)
    assert_same_memory(memory, expected)
    if not channels:
        for asked in ["auto", "load"] if target.machine == WRITES_RAM else MODES:
            with again(target, path, disk, "--mode", asked) as (used, restored_memory):
                assert used == ("lazy" if asked == "auto" else asked)
                assert_same_memory(restored_memory, expected)


@pytest.mark.parametrize("engine", ["auto", "qemu"])
def test_guest_that_vm_save_saved_is_restored(
    target: OtherTarget, ram: GuestRam, disk: Path, engine: str
) -> None:
    path = disk / "snapshot"
    with OtherQemu(target, ram) as qemu:
        expected = bytes(ram.memory)
        save(qemu.socket, path, "--engine", engine, "--then", "quit")
        assert qemu.process.wait(10) == 0
    assert_same_memory(expected, bytes(ram.memory))
    for mode in ["auto", "load"] if target.machine == WRITES_RAM else MODES:
        with again(target, path, disk, "--mode", mode) as (_, memory):
            assert_same_memory(memory, expected)
