"""Every engine of a save with every mode of a restore: the guest goes on where it stopped."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pyqmigrate import vm
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.bare import BareQemu
from tests.harness.compare_memory import assert_same_blocks
from tests.harness.pattern_guest import build
from tests.harness.saved import RAM, Saved, goes_on, memory_of, serial_says

pytestmark = pytest.mark.qemu

SIZE = f"size={RAM}"
MEMORY = {
    "private": [],
    "file": ["-object", f"memory-backend-file,id=BLOCK,{SIZE},mem-path=/dev/shm,share=on"],
    "memfd": ["-object", f"memory-backend-memfd,id=BLOCK,{SIZE},share=on"],
    "two nodes": [
        "-object",
        f"memory-backend-memfd,id=m0,size={RAM // 2},share=on",
        "-object",
        f"memory-backend-memfd,id=m1,size={RAM // 2},share=on",
        "-numa",
        "node,memdev=m0",
        "-numa",
        "node,memdev=m1",
    ],
}
DEVICES = (
    "-device",
    "virtio-rng-pci",
    "-device",
    "virtio-balloon-pci",
    "-device",
    "virtio-serial-pci",
    "-netdev",
    "user,id=net",
    "-device",
    "virtio-net-pci,netdev=net,romfile=",
    "-drive",
    "driver=null-co,size=1M,if=none,id=disk,read-zeroes=on",
    "-device",
    "virtio-blk-pci,drive=disk",
    "-device",
    "VGA",
)
# Machine, what else it has, and the name of its RAM block.
MACHINES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "pc": ("pc", (), "pc.ram"),
    "q35": ("q35", (), "pc.ram"),
    "q35 with devices": ("q35", DEVICES, "pc.ram"),
    "microvm": ("microvm", (), "microvm.ram"),
}


def save_ours(directory: Path, kind: str, memory: str, engine: str) -> Saved:
    """Let a guest run, save it with ``engine``; its memory is read while it stands still."""
    machine, devices, block = MACHINES[kind]
    image, serial, path = build(directory, RAM), directory / "serial", directory / "guest.mapped"
    backend = f",memory-backend={block}" if memory in ("file", "memfd") else ""
    words = [word.replace("BLOCK", block) for word in MEMORY[memory]]
    arguments = ("-M", f"{machine}{backend}", "-m", str(RAM >> 20), *words, *devices)
    with BareQemu(*arguments, "-bios", str(image), "-serial", f"file:{serial}", run=True) as qemu:
        serial_says(serial, 2)

        async def look() -> dict[str, bytes]:
            async with await qemu.connect():
                pass
            report = await vm.connect(qemu.socket).save(path, engine=engine, then="pause")
            assert report.engine == engine
            async with await Monitor.connect(qemu.socket) as monitor:
                return await memory_of(monitor, qemu.process.pid)

        found = asyncio.run(look())
    blocks = ("m0", "m1") if memory == "two nodes" else (block,)
    return Saved(path, image, arguments, blocks, found, serial.read_bytes())


SHORT = {
    *(("pc", memory) for memory in MEMORY),
    ("q35", "memfd"),
    ("q35 with devices", "file"),
    ("microvm", "private"),
}
GUESTS = [
    pytest.param(machine, memory, marks=() if (machine, memory) in SHORT else pytest.mark.long)
    for machine in MACHINES
    for memory in MEMORY
    if (machine, memory) != ("microvm", "two nodes")  # it has no nodes
]


@pytest.mark.parametrize("engine", ["direct", "qemu"])
@pytest.mark.parametrize(("machine", "memory"), GUESTS)
def test_guest_goes_on_where_it_was_saved(
    disk: Path, tmp_path: Path, machine: str, memory: str, engine: str
) -> None:
    saved = save_ours(disk, machine, memory, engine)

    async def run(mode: str) -> None:
        serial = tmp_path / mode
        guest = await vm.restore(saved.path, saved.command(serial=serial), mode=mode, paused=True)
        try:
            assert guest.report.mode == mode
            assert_same_blocks(await memory_of(guest.monitor, guest.process.pid), saved.memory)
            await guest.monitor.execute("cont")
            await goes_on(saved, guest, serial)
        finally:
            await guest.end()

    for mode in ("instant", "load"):
        asyncio.run(run(mode))
    with open_snapshot(saved.path) as snapshot:
        ours = {name: block.read(0, block.length) for name, block in snapshot.blocks.items()}
    assert_same_blocks(ours, saved.memory)
