"""A given command line held against the record of the VM, before QEMU starts.

Only what the words say for certain is a fault: machine type, memory, processors, devices. There
are many ways to write the same, and what is not understood is left to QEMU and to the comparison
with the QEMU that has started.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.qemu.command_line import CommandLine, read_ram_size
from pyqmigrate.vm.record.contents import VmRecord

__all__ = ["compare_command_line"]

# Machine types that stand for the newest of their kind, by how the full names begin.
_ALIASES = {"pc": "pc-i440fx-", "q35": "pc-q35-"}
# Patterns are strings, compiled when first used: a restore waits for each import.
_VERSION = r"-\d+\.\d+$"
_X86 = ("i386", "x86_64")
_MODEL_VERSION = r"-v\d+$"
_RAM_UNIT = 8192  # bytes that QEMU rounds RAM up to
_DEFAULT_RAM = 128 << 20  # of x86 machines
# One device has several names; ids of buses and of what QEMU makes by itself do not count.
_VIRTIO = (
    r"^(virtio-[a-z0-9]+)(?:-pci|-ccw|-device|-pci-non-transitional"
    r"|-pci-transitional)?$"
)
# Devices that are known to have a section in the stream, which QEMU does not load without them.
_HAVE_STATE = (
    r"virtio-|vhost-|e1000|rtl8139|ne2k|pcnet|vmxnet3|igb|i8255|tulip|nvme|.*ahci|.*-[xeuo]hci|usb-|"
    r"lsi|megasas|mptsas|am53c974|scsi-|ide-|.*serial|.*[vV][gG][aA]|qxl|ES1370|AC97|.*hda|"
    r".*root-port|.*bridge|sdhci|ivshmem|pc-dimm|tpm-|floppy"
)


def compare_command_line(command: CommandLine, record: VmRecord) -> tuple[list[str], list[str]]:
    """What of ``command`` cannot be the VM of ``record``, a sentence each with what to give; and
    what may be no fault."""
    faults = [*_machine(command, record), *_memory(command, record), *_processors(command, record)]
    notes: list[str] = []
    for kind, sentence in _devices(command, record):
        (faults if re.match(_HAVE_STATE, kind) else notes).append(sentence)
    return faults, notes


def _machine(command: CommandLine, record: VmRecord) -> Iterator[str]:
    saved = record.machine.type
    given = command.merged("machine", "type").get("type", "")
    if not given:
        if command.has("readconfig") or record.machine.target not in _X86:
            return
        given = "pc"
    given = given.removesuffix("-machine")
    if given == saved or saved.startswith(_ALIASES.get(given, f"{given}-")):
        return  # an alias: which version it is is asked of the QEMU that has started
    if given in _ALIASES or re.search(_VERSION, given) or f"{given}-" not in saved:
        yield (
            f"the snapshot is of machine type {saved}, and the command line makes {given}: "
            f"give -machine {saved}"
        )


def _memory(command: CommandLine, record: VmRecord) -> Iterator[str]:
    saved = record.machine.memory
    if saved is None:
        return
    try:
        given = read_ram_size(command)
    except UsageError:  # QEMU will say so
        return
    if given is None:
        if command.has("readconfig") or record.machine.target not in _X86:
            return
        given = _DEFAULT_RAM
    if -(-given // _RAM_UNIT) != -(-saved // _RAM_UNIT):
        yield (
            f"the snapshot was saved with {_size(saved)} of memory, and the command line gives "
            f"{_size(given)}: give -m {_size(saved)}"
        )


def _size(size: int) -> str:
    for unit, letter in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "k")):
        if size % unit == 0:
            return f"{size // unit}{letter}"
    return f"{size}B"


def _processors(command: CommandLine, record: VmRecord) -> Iterator[str]:
    saved = record.cpus
    drivers = [option.properties("driver").get("driver", "") for option in command.all("device")]
    plugged = sum(driver.endswith("-cpu") for driver in drivers)
    given = _number_of_cpus(command)
    if given is not None and given + plugged < saved.number:
        maximum = f",maxcpus={saved.maximum}" if saved.maximum > saved.number else ""
        yield (
            f"the snapshot was saved with {saved.number} CPUs, and the command line makes "
            f"{given + plugged}: give -smp {saved.number}{maximum}"
        )
    model = command.last("cpu")
    suffix = f"-{record.machine.target}-cpu"
    if model is None or not saved.type.endswith(suffix):
        return
    was = saved.type.removesuffix(suffix)
    now = model.properties("model").get("model", "").removesuffix(suffix)
    if now and re.sub(_MODEL_VERSION, "", now) != re.sub(_MODEL_VERSION, "", was):
        yield (
            f"the snapshot was saved with CPUs of model {was}, and the command line makes {now}: "
            f"give -cpu {was}"
        )


def _number_of_cpus(command: CommandLine) -> int | None:
    """How many ``-smp`` asks for, one without it; None where that is unknown."""
    if command.merged("smp", "cpus"):
        return command.processors()
    return None if command.has("readconfig") else 1


def _devices(command: CommandLine, record: VmRecord) -> Iterator[tuple[str, str]]:
    """Devices of the recorded command line, and those that were plugged in later, that are in no
    option of ``command``: type and sentence."""
    if command.has("readconfig"):
        return
    given = Counter(
        _type(option.properties("driver").get("driver", "")) for option in command.all("device")
    )
    made_otherwise = " ".join(
        option.value or "" for option in command.options if option.name != "device"
    )
    if record.command is not None:
        recorded = CommandLine.parse(record.command)
        for option in recorded.all("device"):
            kind = _type(option.properties("driver").get("driver", ""))
            given[kind] -= 1
            if given[kind] < 0 and not _may_be_made(kind, made_otherwise):
                yield kind, f"the snapshot's VM has a device {kind}: give {option}"
    names = {option.properties("driver").get("id") for option in command.all("device")}
    in_command = " ".join(record.command or ())
    for device in record.devices:
        front, _, name = device.path.rpartition("/")
        if front != "/machine/peripheral" or name in names:
            continue
        later = record.command is None or name not in in_command
        if later and given[_type(device.type)] <= 0:
            given[_type(device.type)] -= 1
            yield (
                device.type,
                (
                    f"the snapshot's VM has a device {device.type} of id {name!r}, which was plugged "
                    f"in after it was started: give -device {device.type},id={name} and what else it "
                    "had"
                ),
            )


def _may_be_made(kind: str, words: str) -> bool:
    """Whether another option may make such a device: -drive if=virtio, -nic model=e1000, -usb."""
    return kind.removeprefix("virtio-") in words or kind.partition("-")[0] in words


def _type(driver: str) -> str:
    virtio = re.match(_VIRTIO, driver)
    return virtio[1] if virtio else driver
