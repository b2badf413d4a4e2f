"""Save, restore and clone of a guest that runs at the processor's own speed, where KVM works.

Where it does not, the same is done with TCG: what is proven then is that the harness works.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.vm.incoming.clone import clone
from pyqmigrate.vm.incoming.restore import restore
from pyqmigrate.vm.outgoing.report import VmSaveReport
from pyqmigrate.vm.outgoing.save import save
from tests.harness.beat import accelerator, assert_beats_on, build, cpu_options
from tests.harness.covering import covering
from tests.harness.machine import BINARY, RAM_BLOCK, GuestRam, Qemu
from tests.harness.pattern_guest import check_pattern
from tests.harness.saving import wait_until

pytestmark = pytest.mark.qemu

RAM = 16 << 20
BEATS = 4
ENGINES = ["qemu", "direct"]
KINDS = ["file", "memfd", "private"]
MACHINES = ["pc", "q35", "microvm"]
MATRIX = covering(
    ((machine, kind, engine) for machine in MACHINES for kind in KINDS for engine in ENGINES),
    short=[("microvm", "private", "direct"), ("microvm", "memfd", "qemu")],
)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("kernel"), RAM)


@dataclass(frozen=True)
class Beating:
    """A guest that beats; ``command`` starts another QEMU like its own."""

    vm: Qemu
    socket: Path
    serial: Path
    machine: str
    kernel: Path

    def save(self, path: Path, **arguments: object) -> VmSaveReport:
        return asyncio.run(save(self.socket, path, **arguments))  # type: ignore[arg-type]

    def command(self, serial: str) -> list[str]:
        block = RAM_BLOCK[self.machine]
        return [
            BINARY,
            "-accel",
            accelerator(),
            *cpu_options(),
            "-nodefaults",
            "-display",
            "none",
            "-machine",
            f"{self.machine},memory-backend={block}",
            "-m",
            f"{RAM >> 20}M",
            "-object",
            f"memory-backend-ram,id={block},size={RAM}",
            "-kernel",
            str(self.kernel),
            "-serial",
            f"file:{serial}",
        ]

    def beats(self) -> int:
        return self.serial.stat().st_size


@contextlib.contextmanager
def beating(directory: Path, kernel: Path, machine: str, kind: str) -> Iterator[Beating]:
    serial, socket, block = directory / "serial", directory / "save.qmp", RAM_BLOCK[machine]
    serial.touch()
    with GuestRam(RAM) as ram:
        backend = {
            "file": f"memory-backend-file,share=on,mem-path=/proc/self/fd/{ram.fd}",
            "memfd": "memory-backend-memfd,share=on",
            "private": "memory-backend-ram",
        }[kind]
        memory = [
            "-machine",
            f"{machine},memory-backend={block}",
            "-m",
            f"{RAM >> 20}M",
            "-object",
            f"{backend},id={block},size={RAM}",
        ]
        with Qemu(
            ram,
            machine=machine,
            run=True,
            memory=memory,
            serial=serial,
            accelerator=accelerator(),
            extra=[
                *cpu_options(),
                "-kernel",
                str(kernel),
                "-qmp",
                f"unix:{socket},server=on,wait=off",
            ],
        ) as vm:
            guest = Beating(vm, socket, serial, machine, kernel)
            wait_until(lambda: guest.beats() >= 2, "the guest does not run", 60)
            yield guest


def generation_of(path: Path, block: str) -> int:
    """What the guest was writing; its pattern is right in the file."""
    with open_snapshot(path) as snapshot:
        ram = snapshot.blocks[block]
        return check_pattern(ram.read(0, ram.length)).generation


@pytest.mark.parametrize(("machine", "kind", "engine"), MATRIX)
def test_guest_finds_its_memory_as_it_left_it(
    machine: str, kind: str, engine: str, disk: Path, kernel: Path
) -> None:
    path = disk / "snapshot"
    with beating(disk, kernel, machine, kind) as guest:
        report = guest.save(path, engine=engine)
        assert report.engine == engine and report.run_state_after == "running"
        before = guest.beats()
        wait_until(lambda: guest.beats() >= before + 2, "it does not go on", 60)
        generation = generation_of(path, RAM_BLOCK[machine])
        guest.vm.kill()
        assert_beats_on(guest.serial, 1, before + 2)
        for mode in ("instant", "load"):
            serial = disk / mode
            serial.touch()

            async def restored(mode: str = mode, serial: Path = serial) -> None:
                vm = await restore(path, guest.command(str(serial)), mode=mode)
                try:
                    assert (vm.report.mode, vm.report.run_state) == (mode, "running")
                    await asyncio.to_thread(assert_beats_on, serial, generation, BEATS)
                finally:
                    await vm.end()

            asyncio.run(restored())


@pytest.mark.parametrize("engine", covering(["direct", "qemu"], short=["direct"]))
def test_clones_go_on_each_by_itself(engine: str, disk: Path, kernel: Path) -> None:
    path = disk / "snapshot"
    with beating(disk, kernel, "microvm", "private") as guest:
        guest.save(path, engine=engine)
        command = guest.command(str(disk / "clone{n}"))
    generation = generation_of(path, "microvm.ram")

    async def cloned() -> None:
        for number in (1, 2):
            (disk / f"clone{number}").touch()
        clones = await clone(path, command, 2, directory=disk)
        try:
            for number in (1, 2):
                await asyncio.to_thread(assert_beats_on, disk / f"clone{number}", generation, BEATS)
        finally:
            for made in clones:
                assert made.vm is not None, made.error
                await made.vm.end()

    asyncio.run(cloned())


def test_live_save_of_a_fast_guest_is_of_one_instant(disk: Path, kernel: Path) -> None:
    path = disk / "snapshot"
    with beating(disk, kernel, "microvm", "memfd") as guest:
        report = guest.save(path, live=True)
        assert report.run_state_after == "running"
        before = guest.beats()
        wait_until(lambda: guest.beats() >= before + 2, "it does not go on", 60)
    generation_of(path, "microvm.ram")
    assert_beats_on(guest.serial, 1, before + 2)
