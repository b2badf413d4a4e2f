"""Check that a command line makes the machine that a snapshot was taken of.

QEMU loads a snapshot into other processors or devices silently, or fails with errors that do not
name the cause. The command line is compared before QEMU starts (:func:`compare_command`), the rest
when its monitor answers. Each function returns notes, and raises UsageError for what cannot work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pyqmigrate.errors import BlockMismatch, UsageError
from pyqmigrate.vm.guest import ramblock
from pyqmigrate.vm.incoming.saved_machine import SavedMachine
from pyqmigrate.vm.qemu.command_line import CommandLine

if TYPE_CHECKING:
    from pyqmigrate.snapshot.base import Snapshot
    from pyqmigrate.vm.qemu.commands import Commands

__all__ = [
    "accelerators",
    "compare_blocks",
    "compare_command",
    "compare_devices",
    "compare_type",
    "compile_patterns",
    "questions",
]

_NOT_MIGRATED = "mmaps["  # in the names of device memory that is never in a stream
# Patterns are strings, compiled when first used: a restore waits for each import.
_TREE_LINE = (
    r"(?P<indent> *)(?:dev: (?P<type>[^,]+), id \"(?P<id>[^\"]*)\"|"
    r"addr = (?P<slot>[0-9a-f]{2}\.[0-7]))$"
)
_OTHER_ROOT = "pxb"  # expander bridges number their buses independently
# Devices without a PCI address, and the names of their states.
_PORTS = {"isa-serial": "serial", "isa-parallel": "parallel_isa", "isa-fdc": "fdc"}
# Names of device states that differ from the device types.
_STATES = {
    "virtio-net-pci": "virtio-net",
    "virtio-blk-pci": "virtio-blk",
    "virtio-scsi-pci": "virtio-scsi",
    "virtio-rng-pci": "virtio-rng",
    "virtio-balloon-pci": "virtio-balloon",
    "virtio-serial-pci": "virtio-console",
    "e1000": "e1000",
    "e1000e": "e1000e",
    "rtl8139": "rtl8139",
}
_TYPE: dict[str, object] = {"path": "/machine", "property": "type"}
_NOT_KNOWN = "the guest does not know it"
# Devices of other types may have no state.
_HAVE_STATE = (
    r"virtio-|e1000|rtl8139|ne2k_pci|pcnet|vmxnet3|igb|i8255|tulip|nvme|ich9-ahci|.*-[xeuo]hci|"
    r"lsi|megasas|mptsas|am53c974|pci-serial|VGA|qxl|ES1370|AC97|intel-hda|ich9-intel-hda|"
    r"pcie-root-port|ioh3420|pci-bridge|i82801b11-bridge|sdhci-pci|ivshmem"
)


def compare_command(command: CommandLine, saved: SavedMachine) -> list[str]:
    """Compare the processors and the accelerator of the options."""
    notes: list[str] = []
    asked = accelerators(command)
    if len(asked) == 1:
        notes += _compare_accelerator(asked == ["kvm"], saved)
    processors = _processors(command)
    if processors is not None and saved.processors is not None and processors < saved.processors:
        raise _too_few(processors, saved.processors)
    return notes


def questions(
    command: CommandLine, saved: SavedMachine
) -> Iterator[tuple[str, dict[str, object] | None]]:
    """Generate what the comparisons with a running QEMU ask it: commands and their arguments."""
    yield "qom-get", _TYPE
    if len(accelerators(command)) != 1 and saved.kvm is not None:
        yield "query-kvm", None
    if saved.processors is not None:
        yield "query-cpus-fast", None
    if saved.pci is not None and saved.counts is not None:
        yield "human-monitor-command", {"command-line": "info qtree"}
    yield "human-monitor-command", {"command-line": "info ramblock"}


def compile_patterns() -> None:
    """Prepare for the comparisons with a running QEMU, which take longer the first time."""
    for pattern in (_TREE_LINE, _HAVE_STATE):
        re.compile(pattern)
    ramblock.compile_patterns()


async def compare_devices(
    monitor: Commands, command: CommandLine, saved: SavedMachine
) -> list[str]:
    """Compare the accelerator, processors and devices of a running QEMU; return notes."""
    notes: list[str] = []
    if len(accelerators(command)) != 1 and saved.kvm is not None:
        answer = await monitor.execute("query-kvm")
        notes += _compare_accelerator(bool(answer["enabled"]), saved)
    if saved.processors is not None:
        processors = len(await monitor.execute("query-cpus-fast"))
        if processors < saved.processors:
            raise _too_few(processors, saved.processors)
        if processors > saved.processors:
            notes.append(
                f"the command line makes {_counted(processors)} and the snapshot has "
                f"{saved.processors}: the guest does not know the others; give -smp "
                f"{saved.processors}"
            )
    if saved.pci is not None and saved.counts is not None:
        tree = await monitor.hmp("info qtree")
        devices = _pci_devices(tree)
        faults = [*_missing_ports(tree, saved.counts)]
        if devices:  # none: a machine with another kind of root bus
            faults += [*_missing(devices, saved.pci), *_changed(devices, saved.pci)]
        if faults:
            raise UsageError(
                "the command line makes other devices than the snapshot contains: "
                + "; ".join(faults)
                + ". Give the devices that the guest was saved with, in the same order or with addr="
            )
        notes += _unknown(devices, saved.pci)
        notes += _unknown_ports(tree, saved.counts)
    return notes


async def compare_type(monitor: Commands, snapshot: Snapshot) -> None:
    """Raise UsageError if QEMU's machine type is not the snapshot's."""
    kind = await monitor.execute("qom-get", _TYPE)
    machine = str(kind).removesuffix("-machine")
    if snapshot.machine and machine != snapshot.machine:
        raise UsageError(
            f"the snapshot has machine type {snapshot.machine}, but the command line makes "
            f"{machine}: give -machine {snapshot.machine}"
        )


async def compare_blocks(monitor: Commands, snapshot: Snapshot) -> None:
    """Compare the RAM blocks of a QEMU with the snapshot's.

    Raises BlockMismatch for a block that is missing on either side, or has another length and
    cannot be resized.
    """
    actual = {
        line.name: line for line in ramblock.parse_ramblock(await monitor.hmp("info ramblock"))
    }
    wanted = {name: block.length for name, block in snapshot.blocks.items()}
    faults = [
        *(
            f"{name!r} is missing in the command line's machine"
            for name in wanted.keys() - actual.keys()
        ),
        *(
            f"{name!r} is not in the snapshot"
            for name in actual.keys() - wanted.keys()
            if _NOT_MIGRATED not in name
        ),
        *(
            f"{name!r} has {actual[name].length} bytes in QEMU and {length} in the snapshot"
            for name, length in wanted.items()
            if name in actual and not actual[name].takes(length)
        ),
    ]
    if faults:
        raise BlockMismatch(
            "the command line makes other RAM than the snapshot contains: "
            + "; ".join(sorted(faults))
        )


def accelerators(command: CommandLine) -> list[str]:
    """Return the accelerators that QEMU will try, in order; empty for its default."""
    if command.has("enable-kvm"):
        return ["kvm"]
    names = [option.properties("accel").get("accel", "") for option in command.all("accel")]
    if not names:
        names = command.merged("machine", "type").get("accel", "").split(":")
    return [name for name in names if name]


def _compare_accelerator(kvm: bool, saved: SavedMachine) -> list[str]:
    if saved.kvm_clock and not kvm:
        raise UsageError(
            "the snapshot was saved under KVM (its section 'kvmclock' can be loaded only by KVM), but "
            "the command line does not use KVM: give -accel kvm"
        )
    if saved.kvm and not kvm:
        return ["the snapshot was saved under KVM and continues without it: the guest's TSC jumps"]
    if saved.kvm is False and kvm:
        return [
            "the snapshot was saved without KVM and continues under it: the guest's TSC jumps, which "
            "may stop its clocks; give -accel tcg to continue as before"
        ]
    return []


def _processors(command: CommandLine) -> int | None:
    """Return the number of processors, or None if ``-smp`` does not determine it."""
    if any(
        "-cpu" in option.properties("driver").get("driver", "") for option in command.all("device")
    ):
        return None
    return command.processors()


def _too_few(processors: int, saved: int) -> UsageError:
    return UsageError(
        f"the command line makes {_counted(processors)} and the snapshot has {saved}: "
        f"give -smp {saved}"
    )


def _counted(processors: int) -> str:
    return f"{processors} CPU" if processors == 1 else f"{processors} CPUs"


class _PciDevice(NamedTuple):
    type: str
    id: str

    def __str__(self) -> str:
        return f"{self.type} {self.id!r}" if self.id else self.type


def _pci_devices(tree: str) -> dict[str, _PciDevice]:
    """Return the PCI devices of ``info qtree`` by their slots, from the first root bus on."""
    found: dict[str, _PciDevice] = {}
    above: list[tuple[int, _PciDevice, str]] = []  # indentation, device, slot (empty: none)
    for line in tree.splitlines():
        matched = re.match(_TREE_LINE, line)
        if matched is None:
            continue
        indent = len(matched["indent"])
        if matched["type"] is not None:
            while above and above[-1][0] >= indent:
                above.pop()
            above.append((indent, _PciDevice(matched["type"], matched["id"]), ""))
        elif above and above[-1][0] < indent and not above[0][1].type.startswith(_OTHER_ROOT):
            start, device, _ = above.pop()
            above.append((start, device, matched["slot"]))
            found[":".join(slot for *_, slot in above if slot)] = device
    return found


def _unknown(
    devices: Mapping[str, _PciDevice], saved: Mapping[str, frozenset[str]]
) -> Iterator[str]:
    for slots, device in sorted(devices.items()):
        if slots not in saved and re.match(_HAVE_STATE, device.type):
            yield f"{device} at PCI address {slots} is not in the snapshot: {_NOT_KNOWN}"


def _missing(
    devices: Mapping[str, _PciDevice], saved: Mapping[str, frozenset[str]]
) -> Iterator[str]:
    for slots, states in sorted(saved.items()):
        if slots not in devices:
            yield f"{' and '.join(sorted(states))} at PCI address {slots} is missing"


def _changed(
    devices: Mapping[str, _PciDevice], saved: Mapping[str, frozenset[str]]
) -> Iterator[str]:
    known = set(_STATES.values())
    for slots, device in sorted(devices.items()):
        model = device.type.removesuffix("-transitional").removesuffix("-non")
        state, states = _STATES.get(model), saved.get(slots, frozenset())
        other = sorted(states & known)
        if state is not None and state not in states and other:
            yield f"{device} at PCI address {slots} is {other[0]} in the snapshot"


def _missing_ports(tree: str, saved: Mapping[str, int]) -> Iterator[str]:
    for model, count, saved_count in _ports(tree, saved):
        if count < saved_count:
            yield f"{saved_count} {model} in the snapshot, {count} in QEMU"


def _unknown_ports(tree: str, saved: Mapping[str, int]) -> Iterator[str]:
    for model, count, saved_count in _ports(tree, saved):
        if count > saved_count:
            yield f"{count} {model} in QEMU, {saved_count} in the snapshot: {_NOT_KNOWN}"


def _ports(tree: str, saved: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """Generate each type with its counts in ``info qtree`` and in the snapshot."""
    types = [found["type"] for line in tree.splitlines() if (found := re.match(_TREE_LINE, line))]
    for model, state in _PORTS.items():
        yield model, types.count(model), saved.get(state, 0)
