"""Compare a command line with the record of the VM, before QEMU starts.

Only certain differences are faults: machine type, memory, CPUs, devices. The same machine can be
written in many ways; anything unclear is left to QEMU and to the comparison with the started QEMU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.qemu.command_line import CommandLine, read_ram_size
from pyqmigrate.vm.record.contents import VmRecord

__all__ = ["compare_command_line"]

# Aliases of the newest machine type of a kind, and how the full names begin.
_ALIASES = {"pc": "pc-i440fx-", "q35": "pc-q35-"}
# Patterns are strings, compiled when first used: a restore waits for each import.
_VERSION = r"-\d+\.\d+$"
_X86 = ("i386", "x86_64")
_MODEL_VERSION = r"-v\d+$"
_RAM_UNIT = 8192  # bytes that QEMU rounds RAM up to
_DEFAULT_RAM = 128 << 20  # of x86 machines
# A device may have several names.
_VIRTIO = (
    r"^(virtio-[a-z0-9]+)(?:-pci|-ccw|-device|-pci-non-transitional"
    r"|-pci-transitional)?$"
)
# Devices that have a section in the stream, which QEMU cannot load without them.
_HAVE_STATE = (
    r"virtio-|vhost-|e1000|rtl8139|ne2k|pcnet|vmxnet3|igb|i8255|tulip|nvme|.*ahci|.*-[xeuo]hci|usb-|"
    r"lsi|megasas|mptsas|am53c974|scsi-|ide-|.*serial|.*[vV][gG][aA]|qxl|ES1370|AC97|.*hda|"
    r".*root-port|.*bridge|sdhci|ivshmem|pc-dimm|tpm-|floppy"
)


def compare_command_line(command: CommandLine, record: VmRecord) -> tuple[list[str], list[str]]:
    """Return two lists of differences from the VM of ``record``: faults, each with a remedy, and
    notes, which may be harmless."""
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
        return  # an alias: its version is compared once QEMU has started
    if given in _ALIASES or re.search(_VERSION, given) or f"{given}-" not in saved:
        yield (
            f"the snapshot has machine type {saved}, but the command line makes {given}: "
            f"give -machine {saved}"
        )


def _memory(command: CommandLine, record: VmRecord) -> Iterator[str]:
    saved = record.machine.memory
    if saved is None:
        return
    try:
        given = read_ram_size(command)
    except UsageError:  # QEMU reports it
        return
    if given is None:
        if command.has("readconfig") or record.machine.target not in _X86:
            return
        given = _DEFAULT_RAM
    if -(-given // _RAM_UNIT) != -(-saved // _RAM_UNIT):
        yield (
            f"the snapshot was saved with {_size(saved)} of memory, but the command line gives "
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
            f"the snapshot was saved with {saved.number} CPUs, but the command line makes "
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
            f"the snapshot was saved with CPUs of model {was}, but the command line makes {now}: "
            f"give -cpu {was}"
        )


def _number_of_cpus(command: CommandLine) -> int | None:
    """Return the number given by ``-smp``, 1 without it; None if unknown."""
    if command.merged("smp", "cpus"):
        return command.processors()
    return None if command.has("readconfig") else 1


def _devices(command: CommandLine, record: VmRecord) -> Iterator[tuple[str, str]]:
    """Yield type and sentence of recorded and hot-plugged devices that ``command`` lacks."""
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
                    f"the snapshot's VM has a device {device.type} of id {name!r}, which was "
                    f"plugged in later: give -device {device.type},id={name} and what "
                    "else it had"
                ),
            )


def _may_be_made(kind: str, words: str) -> bool:
    """Return whether another option may make such a device: -drive if=virtio, -nic, -usb."""
    return kind.removeprefix("virtio-") in words or kind.partition("-")[0] in words


def _type(driver: str) -> str:
    virtio = re.match(_VIRTIO, driver)
    return virtio[1] if virtio else driver
