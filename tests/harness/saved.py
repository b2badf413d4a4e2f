"""A running guest that QEMU saved, and what its memory was; guests that go on from it.

The guest is that of ``guest.s``: it writes its pattern over its memory again and again, and counts
on its serial port.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyqmigrate.vm.guest.ramblock import parse_ramblock
from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.bare import BareQemu
from tests.harness.machine import BINARY
from tests.harness.pattern_guest import PAGE, build, check_pattern

__all__ = ["RAM", "Saved", "fill", "goes_on", "memory_of", "migrate", "save_guest", "serial_says"]

RAM = 24 << 20
_PATIENCE = 60.0  # seconds


@dataclass(frozen=True)
class Saved:
    """``path`` of the snapshot, the memory of each block and the reports at that instant.

    ``arguments`` make the machine, ``blocks`` are the guest's RAM in order of address.
    """

    path: Path
    image: Path
    arguments: tuple[str, ...]
    blocks: tuple[str, ...]
    memory: dict[str, bytes]
    reports: bytes

    def command(self, *arguments: str, serial: Path) -> list[str]:
        """The command line of a guest that is to go on; without arguments, of the same machine."""
        return [
            BINARY,
            "-accel",
            "tcg",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            *(arguments or self.arguments),
            "-bios",
            str(self.image),
            "-serial",
            f"file:{serial}",
        ]


def save_guest(
    directory: Path,
    arguments: Sequence[str],
    blocks: Sequence[str] = ("pc.ram",),
    *,
    ram: int = RAM,
    offset: int = 0,
    paused: bool = False,
) -> Saved:
    """Let a guest run, save it live (or paused) with QEMU's own multifd, and end it."""
    image, serial, path = build(directory, ram), directory / "serial", directory / "guest.mapped"
    serial.unlink(missing_ok=True)
    with BareQemu(*arguments, "-bios", str(image), "-serial", f"file:{serial}", run=True) as qemu:
        serial_says(serial, 2)

        async def save(monitor: Monitor) -> dict[str, bytes]:
            if paused:
                await monitor.execute("stop")
            await migrate(monitor, f"file:{path}" + f",offset={offset}" * bool(offset))
            return await memory_of(monitor, qemu.process.pid)

        memory = qemu.run(save)
    return Saved(path, image, tuple(arguments), tuple(blocks), memory, serial.read_bytes())


async def migrate(monitor: Monitor, uri: str) -> None:
    """A mapped-ram save by QEMU's multifd, waited for."""
    states = [{"capability": name, "state": True} for name in ("mapped-ram", "multifd")]
    await monitor.execute("migrate-set-capabilities", {"capabilities": states})
    await monitor.execute("migrate-set-parameters", {"max-bandwidth": 0})
    await monitor.execute("migrate", {"uri": uri})
    answer: dict[str, Any] = {}
    while answer.get("status") != "completed":
        await asyncio.sleep(0.01)
        answer = await monitor.execute("query-migrate")
        assert answer["status"] not in ("failed", "cancelled"), answer


async def memory_of(monitor: Monitor, pid: int) -> dict[str, bytes]:
    """The bytes of every RAM block of a QEMU whose guest stands still."""
    found = {}
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in parse_ramblock(await monitor.hmp("info ramblock")):
            memory.seek(line.host_address)
            found[line.name] = memory.read(line.length)
    return found


async def fill(monitor: Monitor, pid: int, block: str) -> None:
    """Noise into every third page of a block of a guest that stands still."""
    lines = parse_ramblock(await monitor.hmp("info ramblock"))
    found = next(line for line in lines if line.name == block)
    noise = random.Random(0)
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for offset in range(0, found.length, 3 * PAGE):
            memory.seek(found.host_address + offset)
            memory.write(noise.randbytes(PAGE))


def serial_says(serial: Path, length: int) -> bytes:
    """What the guest has written, as soon as it is so much."""
    deadline = time.monotonic() + _PATIENCE
    while not serial.exists() or len(serial.read_bytes()) < length:
        assert time.monotonic() < deadline, "the guest does not run"
        time.sleep(0.005)
    return serial.read_bytes()


async def goes_on(saved: Saved, vm: RestoredVm, serial: Path) -> None:
    """AssertionError unless the guest counts on where it was saved, its pattern whole."""
    said = await asyncio.to_thread(serial_says, serial, 2)
    await vm.monitor.execute("stop")
    memory = await memory_of(vm.monitor, vm.process.pid)
    said = serial.read_bytes()
    first = len(saved.reports) + 1
    assert said == bytes(g & 0x7F for g in range(first, first + len(said)))
    instant = check_pattern(b"".join(memory[name] for name in saved.blocks))
    assert instant.generation - len(saved.reports) - len(said) in (0, 1)
