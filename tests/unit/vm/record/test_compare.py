"""A given command line and the record: what is refused with its cure, and what is not."""

from __future__ import annotations

import pytest

from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.record.compare import compare_command_line
from pyqmigrate.vm.record.contents import Cpus, Device, VmRecord
from tests.harness.vm_records import record

QEMU = "qemu-system-x86_64"
SAVED = f"{QEMU} -M pc -m 64M -smp 2 -device virtio-net-pci,id=net0 -device isa-debug-exit"


def faults(given: str, of: VmRecord | None = None) -> list[str]:
    found, _ = compare_command_line(CommandLine.parse(given.split()), of or saved())
    return found


def saved(command: str = SAVED, **parts: object) -> VmRecord:
    return record(command=command.split(), **parts)  # type: ignore[arg-type]


DEVICE = "-device virtio-net-pci,id=net0 -device isa-debug-exit"


@pytest.mark.parametrize(
    "given",
    [
        SAVED,
        f"{QEMU} -machine pc-i440fx-10.0,usb=off -m 64 -smp cpus=2 {DEVICE}",
        f"{QEMU} -M type=pc,accel=tcg -m size=64M,slots=2,maxmem=1G -smp 2,maxcpus=4 {DEVICE}",
        f"{QEMU} -m 65536k -smp sockets=1,cores=2,threads=1 -cpu qemu64,+aes {DEVICE}",
        f"{QEMU} -m 0.0625G -smp maxcpus=2 -cpu qemu64-v1 {DEVICE}",
        f"{QEMU} -m 64 -smp 1 -device qemu64-x86_64-cpu,id=c {DEVICE}",
        f'{QEMU} -m 64 -smp 3 -device {{"driver":"virtio-net","id":"other"}} {DEVICE}',
        f'{QEMU} -m 64 -smp 2 -device {{"driver":"virtio-net-pci-non-transitional"}}',
        f"{QEMU} -m 64 -smp 2 -nic user,model=virtio-net-pci -device isa-debug-exit",
        f"{QEMU} -readconfig vm.conf",
    ],
)
def test_same_vm_is_taken_however_it_is_written(given: str) -> None:
    assert faults(given) == []


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        (f"{QEMU} -M q35 -m 64 -smp 2 {DEVICE}", "give -machine pc-i440fx-10.0"),
        (f"{QEMU} -M pc-i440fx-9.2 -m 64 -smp 2 {DEVICE}", "give -machine pc-i440fx-10.0"),
        (f"{QEMU} -M microvm -m 64 -smp 2 {DEVICE}", "give -machine pc-i440fx-10.0"),
        (f"{QEMU} -m 128 -smp 2 {DEVICE}", "give -m 64M"),
        (f"{QEMU} -smp 2 {DEVICE}", "give -m 64M"),
        (f"{QEMU} -m 64 {DEVICE}", "give -smp 2"),
        (f"{QEMU} -m 64 -smp cpus=1,maxcpus=2 {DEVICE}", "give -smp 2"),
        (f"{QEMU} -m 64 -smp 2 -cpu max {DEVICE}", "give -cpu qemu64"),
        (f"{QEMU} -m 64 -smp 2 -device isa-debug-exit", "give -device virtio-net-pci,id=net0"),
    ],
)
def test_other_vm_is_refused_with_what_to_give(given: str, cure: str) -> None:
    (sentence,) = faults(given)
    assert sentence.endswith(cure)


def test_device_that_may_have_no_state_is_a_note() -> None:
    command = CommandLine.parse(f"{QEMU} -m 64 -smp 2 -device virtio-net-pci".split())
    found, notes = compare_command_line(command, saved())
    assert found == []
    assert notes == ["the snapshot's VM has a device isa-debug-exit: give -device isa-debug-exit"]


def test_device_that_was_plugged_in_is_missed() -> None:
    devices = (Device("/machine/peripheral/hot", "virtio-rng-pci"),)
    of = saved(devices=devices)
    (sentence,) = faults(SAVED, of)
    assert "plugged in" in sentence and "-device virtio-rng-pci,id=hot" in sentence
    assert faults(f"{SAVED} -device virtio-rng-pci,id=hot", of) == []
    assert faults(f"{SAVED} -device virtio-rng", of) == []


def test_processors_that_were_plugged_in_are_missed() -> None:
    of = saved(cpus=Cpus(3, 4, "qemu64-x86_64-cpu", {}))
    (sentence,) = faults(SAVED, of)
    assert sentence.endswith("give -smp 3,maxcpus=4")


def test_machine_of_another_target_is_not_guessed() -> None:
    of = saved()
    of = of._replace(machine=of.machine._replace(type="virt-10.0", target="aarch64", memory=None))
    assert faults("qemu-system-aarch64 -smp 2 -device virtio-net -device isa-debug-exit", of) == []
    assert (
        faults("qemu-system-aarch64 -M virt -smp 2 -device virtio-net -device isa-debug-exit", of)
        == []
    )


def test_record_without_a_command_line_is_compared_by_what_it_has() -> None:
    of = record(command=None)
    assert [f for f in faults(f"{QEMU} -m 64 -smp 2", of) if "net0" in f]
    assert faults(f"{QEMU} -m 64 -smp 2 -device virtio-net-pci", of) == []
