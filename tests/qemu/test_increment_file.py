"""An increment of a real guest is its whole state: read, flattened, and loaded by QEMU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import UsageError, convert, open_snapshot
from pyqmigrate.enums import Format
from pyqmigrate.format.stream.wire import SectionKind
from pyqmigrate.snapshot.increment import IncrementSnapshot
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.sync import connect
from tests.harness.bare import BareQemu
from tests.harness.compare_memory import assert_same_blocks
from tests.harness.increments import save_twice, write_increment
from tests.harness.saved import memory_of
from tests.harness.writing_guest import GuestSetup, check_snapshot

pytestmark = pytest.mark.qemu

MACHINES = ["q35", pytest.param("pc", marks=pytest.mark.long), "microvm"]


def blocks_of(path: Path) -> dict[str, bytes]:
    with open_snapshot(path) as snapshot:
        return {
            name: block.read(0, block.length)
            for name, block in snapshot.blocks.items()
            if block.length
        }


def states(path: Path) -> list[tuple[str, bytes]]:
    """The device state, as bytes: the increment has no description of it."""
    with open_snapshot(path) as snapshot:
        return [
            (section.name, snapshot.source.read_at(section.body_offset, section.body_length))
            for section in snapshot.stream.sections
            if section.kind is SectionKind.FULL
        ]


def loaded_by_qemu(setup: GuestSetup, path: Path, directory: Path) -> dict[str, bytes]:
    """Have QEMU load a mapped-ram file, paused, and return its memory."""
    command = setup.command(directory)
    kept = command[command.index("-machine") :]

    async def load(monitor: Monitor) -> dict[str, bytes]:
        states = [{"capability": "mapped-ram", "state": True}]
        await monitor.execute("migrate-set-capabilities", {"capabilities": states})
        await monitor.execute("migrate-incoming", {"uri": f"file:{path}"})
        deadline = time.monotonic() + 60
        answer: dict[str, Any] = {}
        while answer.get("status") != "completed":
            assert time.monotonic() < deadline, answer
            answer = await monitor.execute("query-migrate")
            assert answer.get("status") != "failed", answer
        return await memory_of(monitor, qemu.process.pid)

    with BareQemu("-no-user-config", *kept, "-incoming", "defer") as qemu:
        return qemu.run(load)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_flattened_increment_loads_in_qemu_byte_for_byte(disk: Path, machine: str) -> None:
    setup = GuestSetup(machine=machine, ram=64 << 20, working_set=8 << 20)
    base, later = save_twice(setup, disk)
    expected = blocks_of(later)
    step, whole = disk / "step", disk / "whole"
    write_increment(base, later, step, mapped=(setup.block,))
    with open_snapshot(step) as snapshot:
        assert isinstance(snapshot, IncrementSnapshot)
        snapshot.verify()
        assert 0 < snapshot.blocks[setup.block].changed_pages < (64 << 20) // 4096
    assert_same_blocks(blocks_of(step), expected)
    instant = check_snapshot(later, setup)
    convert(step, whole, to=Format.MAPPED_RAM)
    assert_same_blocks(blocks_of(whole), expected)
    assert check_snapshot(whole, setup) == instant
    found = loaded_by_qemu(setup, whole, disk)
    assert_same_blocks({name: found[name] for name in expected}, expected)
    assert states(step) == states(later) == states(whole)


def test_a_save_does_not_replace_the_base_of_increments(disk: Path) -> None:
    """Refused before the guest is stopped, and by either engine."""
    with BareQemu("-machine", "q35", "-m", "32M") as qemu:
        qemu.run_state()  # its monitor listens
        vm = connect(qemu.socket)
        vm.save(disk / "base")
        later = disk / "later"
        vm.save(later)
        write_increment(disk / "base", later, disk / "step", mapped=("pc.ram",))
        before = (disk / "base").stat()
        for engine in ("direct", "qemu"):
            with pytest.raises(UsageError, match="is the base of 'step'"):
                vm.save(disk / "base", engine=engine)
        assert (disk / "base").stat() == before
        assert qemu.run_state() == "prelaunch"
    blocks_of(disk / "step")
