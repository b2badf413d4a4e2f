"""A command line, or its QEMU, is compared with the saved machine."""

from __future__ import annotations

import asyncio
import shlex
from typing import Any, cast

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.incoming.compatibility import compare_command, compare_devices
from pyqmigrate.vm.incoming.saved_machine import SavedMachine
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.monitor import Monitor

SAVED = SavedMachine("running", 2, kvm=False, kvm_clock=False, pci=None, counts=None)
KVM = SAVED._replace(kvm=True, kvm_clock=True)
# From QEMU 10.0, most lines left out.
TREE = """bus: main-system-bus
  type System
  dev: pxb-host, id ""
    bus: pxb
      type pxb-pcie-bus
      dev: pcie-root-port, id "rp2"
        addr = 00.0
        bus: rp2
          type PCIE
          dev: virtio-rng-pci, id ""
            addr = 00.0
  dev: q35-pcihost, id ""
    bus: pcie.0
      type PCIE
      dev: pxb-pcie, id "pxb"
        addr = 05.0
      dev: qemu-xhci, id ""
        addr = 04.0
        bus: usb-bus.0
          type usb-bus
          dev: usb-kbd, id ""
            addr 0.1, port 1, speed 480, name QEMU USB Keyboard, attached
      dev: pcie-root-port, id "rp"
        addr = 02.0
        bus: rp
          type PCIE
          dev: virtio-blk-pci, id ""
            addr = 00.0
            bus: virtio-bus
              type virtio-pci-bus
              dev: virtio-blk-device, id ""
      dev: virtio-net-pci, id "n1"
        addr = 01.0
      dev: mch, id ""
        addr = 00.0
"""
PCI = {
    "04.0": frozenset({"xhci", "1/usb-kbd"}),
    "02.0": frozenset({"pcie-root-port"}),
    "02.0:00.0": frozenset({"virtio-blk"}),
    "01.0": frozenset({"virtio-net"}),
    "00.0": frozenset({"mch"}),
}


def command(text: str) -> CommandLine:
    return CommandLine.parse(["qemu-system-x86_64", *shlex.split(text)])


class Qemu:
    """A fake QEMU with so many processors, with or without KVM, and these devices."""

    def __init__(self, processors: int = 2, kvm: bool = False, tree: str = TREE) -> None:
        self.answers: dict[str, Any] = {
            "query-cpus-fast": [{}] * processors,
            "query-kvm": {"enabled": kvm, "present": True},
        }
        self.tree = tree

    async def execute(self, name: str) -> Any:
        return self.answers[name]

    async def hmp(self, line: str) -> str:
        assert line == "info qtree"
        return self.tree

    def compare(self, saved: SavedMachine, text: str = "-accel tcg") -> list[str]:
        return asyncio.run(compare_devices(cast("Monitor", self), command(text), saved))


@pytest.mark.parametrize(
    "text",
    [
        "-smp 2",
        "-smp cpus=2",
        "-smp 1,maxcpus=4 -device qemu64-x86_64-cpu,id=c",
        "-m 64",
        "-smp 3",
        "-smp sockets=1,cores=2",
        "-smp what",
    ],
)
def test_processors_of_the_command_line_that_may_be_enough_are_taken(text: str) -> None:
    assert compare_command(command(text), SAVED) == []


@pytest.mark.parametrize(
    "text", ["-smp 1", "-smp cpus=1,maxcpus=8", "-smp cores=1,threads=1", "-smp 4 -smp cpus=1"]
)
def test_too_few_processors_are_refused_before_qemu_starts(text: str) -> None:
    with pytest.raises(UsageError, match=r"makes 1 CPU and the snapshot has 2: give -smp 2$"):
        compare_command(command(text), SAVED)


@pytest.mark.parametrize(
    ("text", "kvm"),
    [
        ("-accel kvm", True),
        ("-enable-kvm", True),
        ("-machine q35,accel=kvm", True),
        ("-accel kvm,kernel-irqchip=split", True),
        ("-accel tcg,thread=multi", False),
        ("-machine q35 -machine accel=tcg", False),
    ],
)
def test_accelerator_of_the_command_line_is_compared(text: str, kvm: bool) -> None:
    if kvm:
        assert compare_command(command(text), KVM) == []
        assert "TSC jumps" in compare_command(command(text), SAVED)[0]
    else:
        assert compare_command(command(text), SAVED) == []
        with pytest.raises(UsageError, match=r"saved under KVM .*kvmclock.*: give -accel kvm$"):
            compare_command(command(text), KVM)
        assert "TSC jumps" in compare_command(command(text), KVM._replace(kvm_clock=False))[0]
    assert compare_command(command(text), SAVED._replace(kvm=None)) == []


@pytest.mark.parametrize("text", ["-accel kvm -accel tcg", "-machine pc,accel=kvm:tcg", "-m 64"])
def test_accelerator_that_qemu_chooses_is_asked_for(text: str) -> None:
    assert compare_command(command(text), KVM) == []
    assert Qemu(kvm=True).compare(KVM, text) == []
    with pytest.raises(UsageError, match="give -accel kvm"):
        Qemu(kvm=False).compare(KVM, text)
    assert "TSC jumps" in Qemu(kvm=True).compare(SAVED, text)[0]


def test_processors_of_qemu_are_compared_in_both_directions() -> None:
    assert Qemu(2).compare(SAVED) == []
    (note,) = Qemu(3).compare(SAVED)
    assert "makes 3 CPUs and the snapshot has 2" in note
    with pytest.raises(UsageError, match="makes 1 CPU and the snapshot has 2: give -smp 2"):
        Qemu(1).compare(SAVED)
    assert Qemu(1).compare(SAVED._replace(processors=None)) == []


def test_same_devices_are_taken_whatever_bridges_they_are_behind() -> None:
    assert Qemu().compare(SAVED._replace(pci=PCI, counts={})) == []


def test_device_that_is_missing_is_refused_with_its_place() -> None:
    saved = SAVED._replace(pci=PCI | {"02.0:01.0": frozenset({"e1000"})}, counts={})
    with pytest.raises(UsageError, match=r"e1000 at PCI address 02.0:01.0 is missing"):
        Qemu().compare(saved)


def test_device_of_another_kind_is_refused() -> None:
    saved = SAVED._replace(pci=PCI | {"01.0": frozenset({"e1000"})}, counts={})
    with pytest.raises(UsageError, match=r"virtio-net-pci 'n1' at PCI address 01.0 is e1000 in"):
        Qemu().compare(saved)


def test_device_that_the_guest_does_not_know_is_a_note() -> None:
    saved = SAVED._replace(pci={key: PCI[key] for key in PCI if key != "01.0"}, counts={})
    (note,) = Qemu().compare(saved)
    assert note.startswith("virtio-net-pci 'n1' at PCI address 01.0 is not in the snapshot")


def test_serial_ports_are_counted() -> None:
    tree = TREE + '      dev: isa-serial, id ""\n'
    saved = SAVED._replace(pci=PCI, counts={"serial": 1})
    assert Qemu(tree=tree).compare(saved) == []
    with pytest.raises(UsageError, match="2 isa-serial in the snapshot, 1 in QEMU"):
        Qemu(tree=tree).compare(saved._replace(counts={"serial": 2}))
    (note,) = Qemu(tree=tree).compare(saved._replace(counts={}))
    assert note.startswith("1 isa-serial in QEMU, 0 in the snapshot")


def test_machine_without_such_a_bus_is_not_compared() -> None:
    assert (
        Qemu(tree="bus: main-system-bus\n  type System\n").compare(
            SAVED._replace(pci=PCI, counts={})
        )
        == []
    )
