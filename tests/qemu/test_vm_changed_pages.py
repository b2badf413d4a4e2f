"""What a guest that was restored instantly changed: all of it, found by the kernel's page table."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.vm.guest.changed_pages import RestoredBlock, RestoredRam
from pyqmigrate.vm.guest.ramblock import parse_ramblock
from pyqmigrate.vm.guest.touched_pages import record_working_set
from pyqmigrate.vm.incoming.restore import RestoredVm, restore
from tests.harness.saved import RAM, Saved, memory_of, save_guest

pytestmark = pytest.mark.qemu

M = str(RAM >> 20)
NODES = ["-m", M, "-numa", "node,memdev=m0", "-numa", "node,memdev=m1"]
for node in ("m0", "m1"):
    NODES += ["-object", f"memory-backend-ram,id={node},size={RAM // 2}"]
MACHINES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "pc": (["-M", "pc", "-m", M], ("pc.ram",)),
    "microvm": (["-M", "microvm", "-m", M], ("microvm.ram",)),
    "two nodes": (["-M", "pc", *NODES], ("m0", "m1")),
}


@pytest.fixture(scope="module", params=MACHINES)
def saved(request: pytest.FixtureRequest, module_disk: Path) -> Saved:
    arguments, blocks = MACHINES[request.param]
    directory = module_disk / request.param.replace(" ", "-")
    directory.mkdir()
    return save_guest(directory, arguments, blocks)


async def blocks_of(vm: RestoredVm, snapshot: MappedRamSnapshot) -> list[RestoredBlock]:
    table = await vm.monitor.hmp("info ramblock")
    return [
        RestoredBlock(
            line.name,
            line.host_address,
            line.length,
            snapshot.blocks[line.name].pages_offset,
            snapshot.blocks[line.name].page_size,
        )
        for line in parse_ramblock(table)
        if line.name in vm.report.mapped_blocks
    ]


async def prove(saved: Saved, serial: Path) -> None:
    vm = await restore(saved.path, saved.command(serial=serial), mode="instant", paused=True)
    try:
        with open_snapshot(saved.path) as snapshot, saved.path.open("rb") as base:
            blocks = await blocks_of(vm, snapshot)
            assert {block.name for block in blocks} == set(saved.blocks)
            with RestoredRam(vm.process.pid, blocks) as ram:
                ram.check(base.fileno())
                before = ram.find_changed(channels=2)
                stop, recorded = threading.Event(), []
                watching = threading.Thread(
                    target=lambda: recorded.append(record_working_set(ram, 60, stop=stop))
                )
                watching.start()
                await vm.monitor.execute("cont")
                await asyncio.sleep(0.5)
                await vm.monitor.execute("stop")
                changed = ram.find_changed(channels=2)
                await asyncio.sleep(0.2)
                stop.set()
                await asyncio.to_thread(watching.join)
                memory = await memory_of(vm.monitor, vm.process.pid)
                touched = {
                    (blocks[run.block].name, page)
                    for run in recorded[0].working_set
                    for page in range(run.first, run.first + run.npages)
                }
                for block in blocks:
                    size = block.page_size
                    now = np.frombuffer(memory[block.name], np.uint8).reshape(-1, size)
                    then = snapshot.blocks[block.name].read(0, block.length)
                    differs = (now != np.frombuffer(then, np.uint8).reshape(-1, size)).any(axis=1)
                    found = np.zeros(len(now), dtype=bool)
                    for first, npages in changed[block.name].runs():
                        found[first : first + npages] = True
                    assert not (differs & ~found).any()
                    pages = {(block.name, int(page)) for page in np.flatnonzero(found)}
                    assert pages <= touched
                assert sum(part.count for part in changed.values()) > sum(
                    part.count for part in before.values()
                )
        other = serial.with_name("other")
        other.write_bytes(saved.path.read_bytes())
        ram = RestoredRam(vm.process.pid, blocks)
        with other.open("rb") as wrong, pytest.raises(UsageError, match="another file"):
            ram.check(wrong.fileno())
        ram.close()
        other.unlink()
    finally:
        await vm.end()


def test_everything_that_differs_from_the_snapshot_is_found(saved: Saved, tmp_path: Path) -> None:
    asyncio.run(prove(saved, tmp_path / "serial"))
