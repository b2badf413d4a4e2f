"""The placement of RAM blocks in the guest's physical address space.

    for placement in physical_map(machine, {"pc.ram": 4 << 30}, devices):
        placement.block, placement.address, placement.offset, placement.length

A snapshot names blocks without their guest-physical addresses. These follow from the machine type,
and in part from the device state: see
:mod:`~pyqmigrate.format.address_space.pc` for the PC family. Other machines have their RAM in one
piece.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pyqmigrate.argument_types import check
from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.address_space.pc import PC_FAMILY, ROUNDING_ERRORS, PcMachine, Ram, layers
from pyqmigrate.format.address_space.placement import GivenPlacement, Placement, overlay
from pyqmigrate.format.address_space.srat import nodes_in_order
from pyqmigrate.format.device.cpu import (
    Architecture,
    CpuRegisters,
    cpu_registers,
    power_is_little_endian,
)
from pyqmigrate.format.device.values import Device

__all__ = [
    "GivenPlacement",
    "Placement",
    "Processor",
    "parse_placement",
    "physical_map",
    "processor_of",
]

_NUMBER = "0[xX][0-9a-fA-F]+|[0-9]+"
_GIVEN = re.compile(
    f"(?P<block>.+)@(?P<address>{_NUMBER})"
    rf"(?:\+(?P<offset>{_NUMBER})(?:,(?P<length>{_NUMBER}))?)?",
    re.DOTALL,
)
_ADDRESS_MAX = 1 << 64
_ARM_PRIVILEGED = 0xF  # the bits of CPSR that are clear in user mode
# Blocks that are not the user's memory backends.
_NEVER_RAM = re.compile(r".*/|pc\.bios|pc\.rom|isa-bios|(system|virt)\.flash\d|vga\.")


@dataclass(frozen=True)
class Processor:
    """The processor of a machine: ``elf`` is its number in ELF files, ``described`` the form of its
    registers, if known, ``big_endian`` the byte order of the guest."""

    elf: int
    described: tuple[Architecture, ...] = ()
    big_endian: bool = False


_X86 = Processor(62, (Architecture.X86_64, Architecture.I386))
_AARCH64 = Processor(183, (Architecture.AARCH64,))
_POWER = Processor(21, big_endian=True)
_RISCV = Processor(243)


@dataclass(frozen=True)
class _Flat:
    """Machines that have all RAM in one piece, from ``base`` on."""

    name: re.Pattern[str]
    ram: str
    base: int
    processor: Processor


# Several processors have a machine "virt"; this list has the one of Arm first.
_FLAT = (
    _Flat(re.compile(r"virt(-|\Z)"), "mach-virt.ram", 1 << 30, _AARCH64),
    _Flat(re.compile(r"virt\Z"), "riscv_virt_board.ram", 2 << 30, _RISCV),
    _Flat(re.compile(r"pseries"), "ppc_spapr.ram", 0, _POWER),
    _Flat(re.compile(r"powernv"), "pnv.ram", 0, _POWER),
    _Flat(re.compile(r"sbsa-ref"), "sbsa-ref.ram", 1 << 40, _AARCH64),
    _Flat(re.compile(r"sifive_u"), "riscv.sifive.u.ram", 2 << 30, _RISCV),
    _Flat(re.compile(r"spike"), "riscv.spike.ram", 2 << 30, _RISCV),
    _Flat(re.compile(r"s390-ccw-virtio"), "s390.ram", 0, Processor(22, big_endian=True)),
)


def parse_placement(text: str) -> GivenPlacement:
    """Parse ``NAME@ADDRESS[+OFFSET[,SIZE]]``: a part of block NAME at a guest-physical ADDRESS.

    Numbers are bytes, decimal or hexadecimal (``0x``). Without OFFSET the part starts with the
    block, without SIZE it ends with it. UsageError for any other text.
    """
    check("a placement", text, str)
    found = _GIVEN.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        return GivenPlacement(
            found["block"],
            int(found["address"], 0),
            int(found["offset"] or "0", 0),
            None if found["length"] is None else int(found["length"], 0),
        )
    except ValueError:
        raise UsageError(
            f"{text!r} is not NAME@ADDRESS[+OFFSET[,SIZE]], like pc.ram@0x100000000+0xc0000000"
        ) from None


def physical_map(
    machine: str,
    blocks: Mapping[str, int],
    devices: Iterable[Device] | None = None,
    *,
    given: Sequence[GivenPlacement] = (),
    acpi_tables: bytes = b"",
    max_ram_below_4g: int | None = None,
) -> tuple[Placement, ...]:
    """Return the ranges of the address space that show RAM blocks, by address, without overlaps.

    blocks: the length of each, in the order of the stream.
    devices: the device state, which records the setup by firmware and, for a PC, the amount of RAM
        below 4 GiB. None: firmware is assumed to have run, and RAM to have the default split.
    given: placements from the user, which replace those of the same blocks and hide others at the
        same addresses. If RAM cannot be placed, they are the whole result.
    acpi_tables: content of ``/rom@etc/acpi/tables``, which has the order of NUMA nodes.
    max_ram_below_4g: the value of that machine property, in bytes, for a PC whose device state does
        not record it.

    Unknown blocks are left out. Raises NotSupported if RAM cannot be placed and ``given`` is empty,
    UsageError for parts outside of their blocks or overlapping parts, and for a
    ``max_ram_below_4g`` that contradicts the device state.
    """
    if not blocks:
        raise NotSupported("the snapshot has no RAM blocks, so there is no memory to place")
    by_hand = _checked(given, blocks)
    moved = {placement.block for placement in by_hand}
    try:
        known = None if devices is None else tuple(devices)
        found = _found(machine, blocks, known, acpi_tables, max_ram_below_4g)
    except NotSupported:
        if not by_hand:
            raise
        found = ()
    rest = [[part for part in layer if part.block not in moved] for layer in found]
    return overlay([*rest, by_hand])


def processor_of(machine: str, blocks: Iterable[str], devices: Iterable[Device] = ()) -> Processor:
    """Return a machine's processor; NotSupported if it is not known, and for 32-bit Arm.

    A Power guest may have either byte order: big unless ``devices`` show the other.
    """
    if _pc(machine) is not None:
        return _X86
    devices = tuple(devices)
    cpus = cpu_registers(devices)
    wide = any(cpu.architecture is Architecture.AARCH64 for cpu in cpus)
    if not wide and any(map(_runs_arm_kernel, cpus)):
        raise NotSupported(
            "an Arm guest of 32 bits: ELF cores are of 64; a LiME file (--to lime) has its memory"
        )
    flat = _flat(machine, blocks, devices)
    if flat is not None:
        if flat.processor is _POWER:
            return replace(_POWER, big_endian=not power_is_little_endian(devices))
        return flat.processor
    for cpu in cpus:
        return _X86 if cpu.architecture in _X86.described else _AARCH64
    raise NotSupported(
        f"which processor machine {machine!r} has is not known, and an ELF file has to say it; "
        "a LiME file does not"
    )


def _runs_arm_kernel(cpu: CpuRegisters) -> bool:
    """Return whether the CPU is in a privileged 32-bit mode: a 32-bit program may run on a 64-bit kernel."""
    return cpu.architecture is Architecture.ARM and bool(cpu.general["cpsr"] & _ARM_PRIVILEGED)


def _found(
    machine: str,
    blocks: Mapping[str, int],
    devices: Sequence[Device] | None,
    acpi_tables: bytes,
    max_below: int | None,
) -> Sequence[Sequence[Placement]]:
    pc = _pc(machine)
    if pc is not None:
        ram = _main_ram(pc.ram, blocks, pc.recorded_size(devices or ()), acpi_tables)
        return layers(pc, ram, blocks, devices, max_below)
    flat = _flat(machine, blocks, devices or ())
    if flat is None:
        raise NotSupported(
            f"where machine {machine!r} has its RAM is not known; place it by hand "
            f"(--map NAME@ADDRESS); there are the blocks {[*blocks]}"
        )
    ram = _main_ram(flat.ram, blocks, None, acpi_tables)
    return [ram.seen(0, ram.length, flat.base)]


def _pc(machine: str) -> PcMachine | None:
    return next((pc for pc in PC_FAMILY if pc.name.match(machine)), None)


def _flat(machine: str, blocks: Iterable[str], devices: Sequence[Device]) -> _Flat | None:
    named = [flat for flat in _FLAT if flat.name.match(machine)]
    exact = next((flat for flat in named if flat.ram in blocks), None)
    if exact is not None or not named or named[0].processor != _AARCH64:
        return exact or next(iter(named), None)
    # With a backend of the user's, RAM has any name.
    arm = {Architecture.AARCH64, Architecture.ARM}
    return named[0] if any(c.architecture in arm for c in cpu_registers(devices)) else None


def _main_ram(name: str, blocks: Mapping[str, int], size: int | None, acpi_tables: bytes) -> Ram:
    """Return the blocks that make up RAM, in order; ``size`` is the amount of RAM, if known."""
    if name in blocks:
        return Ram(((name, blocks[name]),))
    backends = {n: length for n, length in blocks.items() if not _NEVER_RAM.match(n)}
    if size is not None and sum(backends.values()) - size not in ROUNDING_ERRORS:
        # Some of them are modules that were plugged in, or are shared with others.
        alone = [n for n, length in backends.items() if length - size in ROUNDING_ERRORS]
        backends = {n: backends[n] for n in alone} if len(alone) == 1 else {}
    if len(backends) == 1:
        return Ram(tuple(backends.items()))
    ordered = nodes_in_order(acpi_tables, backends)
    if not ordered:
        raise NotSupported(
            "which blocks are the guest's RAM, and in which order, is not known; place them by "
            f"hand (--map NAME@ADDRESS); there are {[*blocks]}"
        )
    return Ram(tuple((n, backends[n]) for n in ordered))


def _checked(given: Sequence[GivenPlacement], blocks: Mapping[str, int]) -> list[Placement]:
    """Check the placements from the user and return them by address."""
    placed = []
    for part in given:
        if part.block not in blocks:
            raise UsageError(f"unknown block {part.block!r}; the blocks are {[*blocks]}")
        length = blocks[part.block] - part.offset if part.length is None else part.length
        if part.offset < 0 or length <= 0 or part.offset + length > blocks[part.block]:
            raise UsageError(
                f"bytes {part.offset:#x} to {part.offset + length:#x} are not in block "
                f"{part.block!r} of {blocks[part.block]:#x} bytes"
            )
        if part.address < 0 or part.address + length > _ADDRESS_MAX:
            raise UsageError(f"block {part.block!r} at {part.address:#x} leaves the address space")
        placed.append(Placement(part.block, part.address, part.offset, length))
    placed.sort(key=lambda placement: placement.address)
    for first, second in itertools.pairwise(placed):
        if first.end > second.address:
            raise UsageError(
                f"blocks {first.block!r} and {second.block!r} are both placed at {second.address:#x}"
            )
    return placed
