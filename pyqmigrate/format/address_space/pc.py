"""The address space of the PC family: i440fx, q35, microvm, isapc.

::

    0            RAM
    0xa0000      the window of a VGA card (RAM without one)
    0xc0000      ROMs, or the RAM behind them: firmware copies ROMs to RAM and then maps the RAM
    0x100000     RAM, up to the split
    (BARs)       at addresses that firmware chose, among them the memory of a standard VGA card
    4 GiB - n    firmware of n bytes; its last 128 KiB are also at 0xe0000
    4 GiB        the rest of RAM

The split is below 4 GiB, to leave room for devices, and ``-machine max-ram-below-4g`` moves it. The
amount of RAM on either side is recorded in the clock's CMOS memory, for the firmware. The layout is
that of ``info mtree -f`` of QEMU 10.0.

A direct save may have device state without a description. The fields used here come first in their
sections, so they are found in that case too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.address_space.placement import Hole, Placement
from pyqmigrate.format.device.values import Device

__all__ = ["PC_FAMILY", "ROUNDING_ERRORS", "PcMachine", "Ram", "layers"]

_MIB = 1 << 20
_ROUNDING = 64 << 10
ROUNDING_ERRORS = range(2 * _ROUNDING)  # the error of the sizes in CMOS, which are rounded down
_FOUR_GIB = 4 << 30
# RAM that would reach this address may have been moved up to 1 TiB, for an AMD processor.
_MOVED_FROM = 0xFD_0000_0000

_VGA = Hole(0xA0000, 0x20000)
_VGA_MEMORY = re.compile(r".*vga\.vram|.*vgavram")
_ROMS = 0xC0000
_LOW_FIRMWARE = 0xE0000
_LOW_FIRMWARE_MAX = 0x20000
_ALL_SHADOWED = b"\x33" * 7
_PCI_CONFIG = 256  # bytes of a conventional device
_PCI_DEVICE_VERSION = bytes((0, 0, 0, 2))  # comes before its configuration
_WHOLE = "data"  # what the one field of a section is called that is described as a buffer


@dataclass(frozen=True)
class Ram:
    """The guest's RAM: its blocks in order, with their lengths."""

    blocks: tuple[tuple[str, int], ...]

    @property
    def length(self) -> int:
        return sum(length for _, length in self.blocks)

    def seen(self, start: int, end: int, address: int) -> list[Placement]:
        """Return bytes ``[start, end)`` of RAM, mapped at ``address``."""
        found, at = [], 0
        for name, length in self.blocks:
            first, last = max(start, at), min(end, at + length)
            if first < last:
                found.append(Placement(name, address + first - start, first - at, last - first))
            at += length
        return found


@dataclass(frozen=True)
class PcMachine:
    """A machine type of the family.

    ``ram`` is the name of its RAM block unless the user chose one. RAM of at least ``splits_at``
    bytes has ``below`` of them under 4 GiB. ``pam`` is the first of seven registers in the PCI
    configuration of the host bridge ``bridge`` that select ROM or RAM at 0xc0000; None if ROMs and
    firmware are always mapped. ``max_below`` is the default of max-ram-below-4g; None if the machine
    type does not have this property.
    """

    name: re.Pattern[str]
    ram: str
    splits_at: int
    below: int
    bridge: str = ""
    pam: int | None = None
    max_below: int | None = None

    def recorded_size(self, devices: Iterable[Device]) -> int | None:
        """Return the RAM that CMOS records, rounded down to 64 KiB on either side of 4 GiB."""
        recorded = _recorded_sizes(devices)
        return None if recorded is None else sum(recorded)

    def split(
        self, length: int, devices: Iterable[Device] | None, max_below: int | None = None
    ) -> int:
        """Return how many of ``length`` bytes of RAM are below 4 GiB.

        With ``devices`` None the default of the machine type is assumed. ``max_below`` is the value
        of ``max-ram-below-4g``. Raises NotSupported if the device state does not record it, or not
        exactly, and UsageError if it contradicts ``max_below``.
        """
        if max_below is not None and self.max_below is None:
            raise UsageError("this machine has no max-ram-below-4g")
        default = self._default(length, max_below)
        recorded = None if devices is None else _recorded_sizes(devices)
        if recorded is None or length - sum(recorded) not in ROUNDING_ERRORS:
            if devices is None or max_below is not None or self.max_below is None:
                return default
            raise NotSupported(
                "how much RAM is below 4 GiB is not in the device state"
                + (
                    ""
                    if recorded is None
                    else f" (the clock's memory says {recorded[0]:#x} bytes, "
                    f"and {recorded[1]:#x} above, of {length:#x})"
                )
                + "; say what -machine max-ram-below-4g was (--max-ram-below-4g SIZE; where it was "
                f"not given, {self.max_below >> 20}M), or place RAM by hand "
                "(--map NAME@ADDRESS+OFFSET,SIZE)"
            )
        if max_below is not None and default - recorded[0] not in range(_ROUNDING):
            raise UsageError(
                f"with max-ram-below-4g={max_below:#x} there would be {default:#x} bytes of RAM "
                f"below 4 GiB, and the device state records {recorded[0]:#x}"
            )
        below, above = recorded
        if not above:
            return length
        if default - below in range(_ROUNDING):
            return default
        if below + above != length:
            raise NotSupported(
                "how much RAM is above 4 GiB is recorded to 64 KiB only; place it by hand "
                "(--map NAME@ADDRESS+OFFSET,SIZE)"
            )
        return below

    def _default(self, length: int, max_below: int | None) -> int:
        """Return the split of ``length`` bytes that pc_init1() and pc_q35_init() would choose."""
        most = max_below or self.max_below
        if most is None:
            lowest = self.below if length >= self.splits_at else length
        elif self.splits_at == self.max_below:  # RAM that has to be split is split at a whole GiB
            lowest = min(most, self.below) if length >= most else most
        else:
            lowest = min(self.below if length >= self.splits_at else self.splits_at, most)
        return min(lowest, length)


PC_FAMILY = (
    PcMachine(
        re.compile(r"pc-q35-|q35\Z"), "pc.ram", 0xB0000000, 0x80000000, "mch", 0x90, _FOUR_GIB
    ),
    PcMachine(
        re.compile(r"pc(-i440fx-|\Z)"), "pc.ram", 0xE0000000, 0xC0000000, "I440FX", 0x59, 0xE0000000
    ),
    PcMachine(re.compile(r"microvm"), "microvm.ram", 0xC0000000, 0xC0000000),
    PcMachine(re.compile(r"isapc\Z"), "pc.ram", 0xE0000000, 0xE0000000, max_below=0xE0000000),
)

_BAR = 0x10  # offset of the first BAR in PCI configuration
_BAR_KIND = 0xF  # its low bits; 0 or 8 is memory with an address of 32 bits


def layers(
    machine: PcMachine,
    ram: Ram,
    blocks: Mapping[str, int],
    devices: Sequence[Device] | None,
    max_below: int | None = None,
) -> list[list[Placement]]:
    """Return the layers of the address space, RAM at the bottom.

    Raises NotSupported if RAM may be in either of two places, and the errors of
    :meth:`PcMachine.split`.
    """
    below = machine.split(ram.length, devices, max_below)
    devices = devices or ()
    if _FOUR_GIB + ram.length - below > _MOVED_FROM:
        raise NotSupported(
            "so much RAM may be at 4 GiB or at 1 TiB, which the snapshot does not record; "
            "place it by hand (--map NAME@ADDRESS+OFFSET,SIZE)"
        )
    found = [ram.seen(0, below, 0), ram.seen(below, ram.length, _FOUR_GIB)]
    if any(_VGA_MEMORY.match(name) for name in blocks):
        found.append([_VGA])
    if machine.pam is None:
        found.append([*_option_roms(blocks), *_low_firmware(blocks)])
    else:
        roms = [*_option_roms(blocks), *_low_firmware(blocks)]
        registers = _registers(machine.bridge, machine.pam, devices)
        found.append([part for rom in roms for part in _not_shadowed(rom, registers)])
    if "pc.bios" in blocks:
        length = blocks["pc.bios"]
        found.append([Placement("pc.bios", _FOUR_GIB - length, 0, length)])
    found.append([*_bars(blocks, devices)])
    return found


def _option_roms(blocks: Mapping[str, int]) -> Iterator[Placement]:
    if "pc.rom" in blocks:
        yield Placement("pc.rom", _ROMS, 0, min(blocks["pc.rom"], _LOW_FIRMWARE - _ROMS))


def _low_firmware(blocks: Mapping[str, int]) -> Iterator[Placement]:
    """Return the end of the firmware below 1 MiB; with flash it is a separate copy."""
    name = "isa-bios" if "isa-bios" in blocks else "pc.bios"
    if name in blocks:
        length = min(blocks[name], _LOW_FIRMWARE_MAX)
        yield Placement(name, _MIB - length, blocks[name] - length, length)


def _registers(bridge: str, first: int, devices: Iterable[Device]) -> bytes:
    """Return the seven registers, or the values that firmware leaves if they are not known."""
    for device in devices:
        config = _pci_config(device) if device.name.rpartition("/")[2] == bridge else None
        if config is not None:
            return config[first : first + len(_ALL_SHADOWED)]
    return _ALL_SHADOWED


def _not_shadowed(rom: Placement, registers: bytes) -> Iterator[Placement]:
    """Return the parts of a ROM from which reads are not redirected to RAM.

    Bits 0 and 4 of a register redirect reads of 16 KiB each; the first register has only one such
    bit, for 64 KiB from 0xf0000 on.
    """
    pieces = [(_MIB - 0x10000, 0x10000, registers[0] >> 4)]
    for n, register in enumerate(registers[1:]):
        at = _ROMS + n * 0x8000
        pieces += [(at, 0x4000, register), (at + 0x4000, 0x4000, register >> 4)]
    for address, length, register in pieces:
        start, end = max(rom.address, address), min(rom.end, address + length)
        if start < end and not register & 1:
            yield rom.part(start, end)


def _bars(blocks: Mapping[str, int], devices: Iterable[Device]) -> Iterator[Placement]:
    """Return the memory of standard VGA cards: their first BAR, if the guest has enabled it."""
    for device in devices:
        slot, _, kind = device.name.rpartition("/")
        name = f"{slot}/vga.vram"
        config = _pci_config(device) if kind == "vga" and name in blocks else None
        if config is None:
            continue
        bar = _little(config, _BAR, 4)
        address = bar & ~_BAR_KIND
        if config[4] & 2 and bar & _BAR_KIND in (0, 8) and address and address % blocks[name] == 0:
            yield Placement(name, address, 0, blocks[name])


def _recorded_sizes(devices: Iterable[Device]) -> tuple[int, int] | None:
    """Return the RAM below and above 4 GiB that CMOS records; None without a clock."""
    for device in devices:
        if device.name != "mc146818rtc":
            continue
        cmos = device.state.get("cmos_data") or _undescribed(device)
        if isinstance(cmos, bytes) and len(cmos) >= 0x5E:
            beyond_16_mib, beyond_1_mib = _little(cmos, 0x34, 2), _little(cmos, 0x30, 2)
            if beyond_16_mib:
                below = 16 * _MIB + (beyond_16_mib << 16)
            else:
                below = _MIB + (beyond_1_mib << 10)
            return below, _little(cmos, 0x5B, 3) << 16
    return None


def _pci_config(device: Device) -> bytes | None:
    for state in device.states():
        for field in state.fields:
            if field.type == "pci config" and isinstance(field.value, bytes):
                return field.value if len(field.value) >= _PCI_CONFIG else None
    data = _undescribed(device)
    if len(data) < 4 + _PCI_CONFIG or data[:4] != _PCI_DEVICE_VERSION:
        return None
    return data[4 : 4 + _PCI_CONFIG]


def _undescribed(device: Device) -> bytes:
    """Return the body of a section without a description, or with one that makes it a single
    buffer, as in a direct save (pyqmigrate.format.device.decode)."""
    fields = device.state.fields
    if len(fields) != 1 or device.state.subsections or fields[0].name not in ("", _WHOLE):
        return b""
    return fields[0].value if isinstance(fields[0].value, bytes) else b""


def _little(data: bytes, at: int, length: int) -> int:
    return int.from_bytes(data[at : at + length], "little")
