"""Whether a command line makes the machine that a snapshot was taken of.

QEMU loads a snapshot into other processors or devices without a word, or fails in words that do
not say what to change. What the command line itself says is compared before QEMU starts
(:func:`compare_command`), the rest when it answers. Notes are returned; UsageError is raised for
what cannot work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pyqmigrate.errors import BlockMismatch, UsageError
from pyqmigrate.vm.guest.ramblock import parse_ramblock
from pyqmigrate.vm.incoming.saved_machine import SavedMachine
from pyqmigrate.vm.qemu.command_line import CommandLine

if TYPE_CHECKING:
    from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
    from pyqmigrate.vm.qemu.monitor import Monitor

__all__ = ["compare_blocks", "compare_command", "compare_devices", "compare_type"]

_NOT_MIGRATED = "mmaps["  # in the names of device memory that no stream has
# Patterns are strings, compiled when first used: a restore waits for each import.
_TREE_LINE = (
    r"(?P<indent> *)(?:dev: (?P<type>[^,]+), id \"(?P<id>[^\"]*)\"|"
    r"addr = (?P<slot>[0-9a-f]{2}\.[0-7]))$"
)
_OTHER_ROOT = "pxb"  # expander bridges have buses that are numbered by themselves
# Devices without a PCI address whose number varies, and what they call their state.
_PORTS = {"isa-serial": "serial", "isa-parallel": "parallel_isa", "isa-fdc": "fdc"}
# What devices call their state, where that is not what they are called themselves.
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
_NOT_KNOWN = "the guest does not know of it"
# Devices of other types may have no state, and are not missed in a snapshot.
_HAVE_STATE = (
    r"virtio-|e1000|rtl8139|ne2k_pci|pcnet|vmxnet3|igb|i8255|tulip|nvme|ich9-ahci|.*-[xeuo]hci|"
    r"lsi|megasas|mptsas|am53c974|pci-serial|VGA|qxl|ES1370|AC97|intel-hda|ich9-intel-hda|"
    r"pcie-root-port|ioh3420|pci-bridge|i82801b11-bridge|sdhci-pci|ivshmem"
)


def compare_command(command: CommandLine, saved: SavedMachine) -> list[str]:
    """Compare what the words say of processors and of the accelerator."""
    notes: list[str] = []
    accelerators = _accelerators(command)
    if len(accelerators) == 1:
        notes += _compare_accelerator(accelerators == ["kvm"], saved)
    processors = _processors(command)
    if processors is not None and saved.processors is not None and processors < saved.processors:
        raise _too_few(processors, saved.processors)
    return notes


async def compare_devices(monitor: Monitor, command: CommandLine, saved: SavedMachine) -> list[str]:
    """Compare the accelerator, the processors and the devices of a QEMU; returns notes."""
    notes: list[str] = []
    if len(_accelerators(command)) != 1 and saved.kvm is not None:
        answer = await monitor.execute("query-kvm")
        notes += _compare_accelerator(bool(answer["enabled"]), saved)
    if saved.processors is not None:
        processors = len(await monitor.execute("query-cpus-fast"))
        if processors < saved.processors:
            raise _too_few(processors, saved.processors)
        if processors > saved.processors:
            notes.append(
                f"the command line makes {_counted(processors)} and the snapshot has "
                f"{saved.processors}: the guest does not know of the others; give -smp "
                f"{saved.processors}"
            )
    if saved.pci is not None and saved.counts is not None:
        tree = await monitor.hmp("info qtree")
        devices = _pci_devices(tree)
        faults = [*_missing_ports(tree, saved.counts)]
        if devices:  # none: a machine whose first root bus is another one
            faults += [*_missing(devices, saved.pci), *_changed(devices, saved.pci)]
        if faults:
            raise UsageError(
                "the command line makes other devices than the snapshot has: "
                + "; ".join(faults)
                + ". Give the devices that the guest was saved with, in their order or with addr="
            )
        notes += _unknown(devices, saved.pci)
        notes += _unknown_ports(tree, saved.counts)
    return notes


async def compare_type(monitor: Monitor, snapshot: MappedRamSnapshot) -> None:
    """Raise UsageError for a QEMU of another machine type than the snapshot's."""
    kind = await monitor.execute("qom-get", {"path": "/machine", "property": "type"})
    machine = str(kind).removesuffix("-machine")
    if snapshot.machine and machine != snapshot.machine:
        raise UsageError(
            f"the snapshot is of machine type {snapshot.machine}, and the command line makes "
            f"{machine}: give -machine {snapshot.machine}"
        )


async def compare_blocks(monitor: Monitor, snapshot: MappedRamSnapshot) -> None:
    """Compare the RAM blocks of a QEMU with the snapshot's.

    Raises BlockMismatch for a block that is missing on either side or has another length, and
    cannot take that of the snapshot.
    """
    here = {line.name: line for line in parse_ramblock(await monitor.hmp("info ramblock"))}
    wanted = {name: block.length for name, block in snapshot.blocks.items()}
    faults = [
        *(
            f"{name!r} is missing in the command line's machine"
            for name in wanted.keys() - here.keys()
        ),
        *(
            f"{name!r} is not in the snapshot"
            for name in here.keys() - wanted.keys()
            if _NOT_MIGRATED not in name
        ),
        *(
            f"{name!r} has {here[name].length} bytes here and {length} in the snapshot"
            for name, length in wanted.items()
            if name in here and not here[name].takes(length)
        ),
    ]
    if faults:
        raise BlockMismatch(
            "the command line makes other RAM than the snapshot has: " + "; ".join(sorted(faults))
        )


def _accelerators(command: CommandLine) -> list[str]:
    """Those that QEMU will try, in order; empty where it has to choose by itself."""
    if command.has("enable-kvm"):
        return ["kvm"]
    names = [option.properties("accel").get("accel", "") for option in command.all("accel")]
    if not names:
        names = command.merged("machine", "type").get("accel", "").split(":")
    return [name for name in names if name]


def _compare_accelerator(kvm: bool, saved: SavedMachine) -> list[str]:
    if saved.kvm_clock and not kvm:
        raise UsageError(
            "the snapshot was saved under KVM (it has a section 'kvmclock', which only KVM loads) "
            "and the command line does not run the guest under KVM: give -accel kvm"
        )
    if saved.kvm and not kvm:
        return ["the snapshot was saved under KVM and goes on without it: the guest's TSC jumps"]
    if saved.kvm is False and kvm:
        return [
            "the snapshot was saved without KVM and goes on under it: the guest's TSC jumps, which "
            "may stop its clocks; give -accel tcg to go on as before"
        ]
    return []


def _processors(command: CommandLine) -> int | None:
    """How many ``-smp`` asks for, where that says it all."""
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
    """The PCI devices in what ``info qtree`` prints, by their slots from the first root bus on."""
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
    for model, made, counted in _ports(tree, saved):
        if made < counted:
            yield f"{counted} {model} in the snapshot, {made} here"


def _unknown_ports(tree: str, saved: Mapping[str, int]) -> Iterator[str]:
    for model, made, counted in _ports(tree, saved):
        if made > counted:
            yield f"{made} {model} here, {counted} in the snapshot: {_NOT_KNOWN}"


def _ports(tree: str, saved: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """Each type, how many ``info qtree`` shows, and how many are in the snapshot."""
    types = [found["type"] for line in tree.splitlines() if (found := re.match(_TREE_LINE, line))]
    for model, state in _PORTS.items():
        yield model, types.count(model), saved.get(state, 0)
