"""A real QEMU that writes its device state and leaves the pages to us, both ways."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from pyqmigrate import Descriptors, FileMemory, ProcessMemory
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import Memory, RamBlock
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.writer import SaveOptions, SaveReport
from pyqmigrate.vm.guest.device_state import DeviceState, read_devices, read_migrated
from tests.harness.machine import MigrationFailed, Mode, Qemu

__all__ = ["FOREIGN", "DirectQemu", "poke", "write_snapshot"]

_FDSET = 3
FOREIGN = [
    "-device",
    "VGA",
    "-device",
    "virtio-blk-pci,drive=disk0",
    "-blockdev",
    "null-co,node-name=disk0",
    "-device",
    "virtio-net-pci,netdev=net0",
    "-netdev",
    "user,id=net0",
    "-device",
    "virtio-rng-pci",
    "-device",
    "virtio-balloon-pci",
    "-device",
    "virtio-serial-pci",
    "-device",
    "qemu-xhci",
    "-device",
    "usb-tablet",
    "-device",
    "usb-kbd",
]


@contextlib.contextmanager
def _unnamed(vm: Qemu, directory: Path) -> Iterator[int]:
    """A file that has no name, lent to QEMU as its fdset; gives a descriptor to read it with."""
    written = os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        reader = os.open(f"/proc/self/fd/{written}", os.O_RDONLY | os.O_CLOEXEC)
        vm.execute("add-fd", {"fdset-id": _FDSET}, fd=written)
    finally:
        os.close(written)
    try:
        yield reader
    finally:
        os.close(reader)
        vm.execute("remove-fd", {"fdset-id": _FDSET})


def write_snapshot(path: Path, state: DeviceState, memories: Mapping[str, Memory]) -> SaveReport:
    """Write a snapshot of ``state`` with the pages of ``memories``, as engine direct does."""
    pages = {**state.carried, **memories}
    blocks = [
        RamBlock(name, _sized(pages[name], length), state.page_size)
        for name, length in state.blocks.items()
    ]
    writer = Writer(
        path,
        blocks,
        SaveOptions(
            machine=state.machine, target_page_bits=state.target_page_bits, uuid=state.uuid
        ),
    )
    return Job(
        writer.channels,
        writer.total,
        lambda: writer.run(
            state.sections, state.description, switchover_start=state.switchover_start
        ),
    ).wait()


def _sized(memory: Memory, length: int) -> Memory:
    if isinstance(memory, FileMemory) and memory.length is None:
        return replace(memory, length=length)
    return memory


class DirectQemu(Qemu):
    """As Qemu; ``migrated_state`` and ``device_state`` are the two ways to its device state."""

    def migrated_state(self, directory: Path, elsewhere: tuple[str, ...] = ()) -> DeviceState:
        """By ``migrate`` with x-ignore-shared, which stops the guest."""
        self.set_capabilities({"events": True, "x-ignore-shared": True, "mapped-ram": False})
        with _unnamed(self, directory) as reader:
            self.execute("migrate", {"uri": f"file:/dev/fdset/{_FDSET}"})
            result = self.wait()
            if result["status"] != "completed":
                raise MigrationFailed(result, self.stderr())
            state = read_migrated(Descriptors(reader), elsewhere=elsewhere)
        self.set_capabilities({"x-ignore-shared": False})
        return state

    def device_state(self, directory: Path, run_state: str | None = None) -> DeviceState:
        """By ``xen-save-devices-state``, which leaves a paused guest as it is."""
        with _unnamed(self, directory) as reader:
            arguments = {"filename": f"/dev/fdset/{_FDSET}", "live": False}
            self.execute("xen-save-devices-state", arguments)
            return read_devices(
                Descriptors(reader),
                machine=self.machine_name(),
                run_state=run_state,
                blocks={name: length for name, (_, length) in self.where_blocks_are().items()},
            )

    def process_memories(self) -> dict[str, ProcessMemory]:
        """All RAM blocks, as the process has them."""
        return {
            name: ProcessMemory(self.process.pid, address, length)
            for name, (address, length) in self.where_blocks_are().items()
        }

    def save_directly(
        self, path: Path, state: DeviceState, memories: Mapping[str, Memory]
    ) -> dict[str, bytes]:
        """Write the snapshot; returns what the RAM blocks held."""
        write_snapshot(path, state, memories)
        return self.read_blocks()

    def is_loaded(self, path: Path, mode: Mode) -> dict[str, bytes]:
        """Load the snapshot; returns what the RAM blocks hold then."""
        self.load(path, mode)
        return self.read_blocks()


def poke(vm: Qemu, block: str, offset: int, data: bytes) -> None:
    """Write into a RAM block from outside, whatever kind of memory it is."""
    address, length = vm.where_blocks_are()[block]
    assert offset + len(data) <= length
    with Path(f"/proc/{vm.process.pid}/mem").open("r+b", buffering=0) as memory:
        assert os.pwrite(memory.fileno(), data, address + offset) == len(data)
