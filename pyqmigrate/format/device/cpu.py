"""The registers of the guest's CPUs, from their ``cpu`` sections.

    for cpu in cpu_registers(devices):
        cpu.architecture, cpu.general["rip"], cpu.control["cr3"], cpu.segments["fs"].base

QEMU names the fields after its own structures; the names here are those of gdb and the manuals. A
register without a field in the description is missing from its mapping.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pyqmigrate.argument_types import check
from pyqmigrate.errors import UsageError
from pyqmigrate.format.device.values import Device, State, Value

__all__ = ["Architecture", "CpuRegisters", "Segment", "cpu_registers", "power_is_little_endian"]


class Architecture(enum.StrEnum):
    """The architecture of the registers; for Arm, the execution state of the CPU when it stopped."""

    X86_64 = "x86_64"
    I386 = "i386"
    AARCH64 = "aarch64"
    ARM = "arm"


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register of x86. ``flags`` are bits 32 to 63 of its descriptor."""

    selector: int
    base: int
    limit: int
    flags: int


@dataclass(frozen=True, slots=True)
class CpuRegisters:
    """The registers of one CPU; ``index`` is its number in QEMU.

    - ``general``: x86: ``rax`` .. ``r15``, ``rip``, ``rflags`` (``eax`` .. without 64 bits);
      AArch64: ``x0`` .. ``x30``, ``sp``, ``pc``, ``pstate``; Arm: ``r0`` .. ``r15``, ``cpsr``.
    - ``control``: x86: ``cr0`` ``cr2`` ``cr3`` ``cr4``, ``efer``, ``dr0`` .. ``dr7`` and the MSRs
      around system calls; AArch64: ``ttbr0_el1`` and the like, ``elr_el1``, ``sp_el1``.
    - ``segments``: x86: ``es`` ``cs`` ``ss`` ``ds`` ``fs`` ``gs`` ``ldt`` ``tr`` ``gdt`` ``idt``.
    - ``vectors``: the low 128 bits of the vector registers, as numbers.
    """

    architecture: Architecture
    index: int
    general: Mapping[str, int]
    control: Mapping[str, int]
    segments: Mapping[str, Segment]
    vectors: tuple[int, ...]


# In the order of QEMU's array, which is that of the numbers in machine code.
_X86_LEGACY = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
_X86_EXTENDED = tuple(f"r{n}" for n in range(8, 16))
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
_TABLES = ("ldt", "tr", "gdt", "idt")
_X86_CONTROL = {
    "cr0": "env.cr[0]",
    "cr2": "env.cr[2]",
    "cr3": "env.cr[3]",
    "cr4": "env.cr[4]",
    "efer": "env.efer",
    "star": "env.star",
    "lstar": "env.lstar",
    "cstar": "env.cstar",
    "fmask": "env.fmask",
    "kernel_gs_base": "env.kernelgsbase",
    "tsc": "env.tsc",
    "sysenter_cs": "env.sysenter_cs",
    "sysenter_esp": "env.sysenter_esp",
    "sysenter_eip": "env.sysenter_eip",
    "mxcsr": "env.mxcsr",
}

_POWER_LPCR, _POWER_ILE = 318, 1 << 25  # a special purpose register, and a bit of it
_POWER_LE = 1  # a bit of MSR

_ARM_MODE_32 = 0x10  # the bit of CPSR and PSTATE that is set in AArch32
_ARM_SYSTEM_64 = 0x6030_0000_0013_0000  # a 64-bit system register, as KVM numbers them
_ARM_CONTROL = {  # op0, op1, CRn, CRm, op2
    "sctlr_el1": (3, 0, 1, 0, 0),
    "ttbr0_el1": (3, 0, 2, 0, 0),
    "ttbr1_el1": (3, 0, 2, 0, 1),
    "tcr_el1": (3, 0, 2, 0, 2),
    "esr_el1": (3, 0, 5, 2, 0),
    "far_el1": (3, 0, 6, 0, 0),
    "mair_el1": (3, 0, 10, 2, 0),
    "vbar_el1": (3, 0, 12, 0, 0),
    "tpidr_el0": (3, 3, 13, 0, 2),
    "tpidr_el1": (3, 0, 13, 0, 4),
}


def cpu_registers(devices: Iterable[Device]) -> tuple[CpuRegisters, ...]:
    """Return the registers of each CPU in ``devices``, by number.

    CPUs other than x86 and Arm, and those without a description, are left out.
    """
    devices = _checked(devices)
    found = (_read(device.state, device.instance_id) for device in devices if device.name == "cpu")
    return tuple(sorted((cpu for cpu in found if cpu is not None), key=lambda cpu: cpu.index))


def _checked(devices: Iterable[Device]) -> Sequence[Device]:
    if not isinstance(devices, Iterable):
        raise UsageError(f"devices must be a list of Device, not {devices!r}")
    members = tuple(devices)
    for member in members:
        check("a device", member, Device)
    return members


def power_is_little_endian(devices: Iterable[Device]) -> bool:
    """Return whether the kernel of a 64-bit Power guest runs in little-endian mode.

    It does if interrupts are taken in that mode (LPCR[ILE]), or a CPU is in it (MSR[LE]). False if
    ``devices`` do not show it: firmware is big-endian.
    """
    for device in devices:
        if device.name == "cpu" and "env.msr" in device.state:
            registers = _numbers(device.state.get("env.spr"))
            lpcr = registers[_POWER_LPCR] if len(registers) > _POWER_LPCR else 0
            if lpcr & _POWER_ILE or (_number(device.state.get("env.msr")) or 0) & _POWER_LE:
                return True
    return False


def _read(state: State, index: int) -> CpuRegisters | None:
    if "env.eip" in state and "env.regs" in state:
        return _x86(state, index)
    if "env.xregs" in state and "cpsr" in state:
        return _arm(state, index)
    return None


def _x86(state: State, index: int) -> CpuRegisters | None:
    values = _numbers(state["env.regs"])
    wide = len(values) == len(_X86_LEGACY) + len(_X86_EXTENDED)
    if not wide and len(values) != len(_X86_LEGACY):
        return None
    prefix = "r" if wide else "e"
    names = [*(prefix + name for name in _X86_LEGACY), *_X86_EXTENDED]
    general = dict(zip(names, values, strict=False)) | _named(
        state, {f"{prefix}ip": "env.eip", f"{prefix}flags": "env.eflags"}
    )
    debug = enumerate(_numbers(state.get("env.dr")))
    control = _named(state, _X86_CONTROL) | {f"dr{n}": value for n, value in debug}
    segments: dict[str, State] = dict(zip(_SEGMENTS, _states(state.get("env.segs")), strict=False))
    for name in _TABLES:
        table = state.get(f"env.{name}")
        if isinstance(table, State):
            segments[name] = table
    vectors = [
        _wide(xmm.get("_q_ZMMReg[0]"), xmm.get("_q_ZMMReg[1]"))
        for xmm in _states(state.get("env.xmm_regs[0]"))
    ]
    return CpuRegisters(
        Architecture.X86_64 if wide else Architecture.I386,
        index,
        MappingProxyType(general),
        MappingProxyType(control),
        MappingProxyType({name: _segment(value) for name, value in segments.items()}),
        tuple(vectors),
    )


def _segment(state: State) -> Segment:
    parts = ("selector", "base", "limit", "flags")
    return Segment(*(_number(state.get(part)) or 0 for part in parts))


def _arm(state: State, index: int) -> CpuRegisters | None:
    status = _number(state["cpsr"])
    if status is None:
        return None
    if status & _ARM_MODE_32:
        values = _numbers(state.get("env.regs"))
        general = {f"r{n}": value for n, value in enumerate(values)} | {"cpsr": status}
        architecture = Architecture.ARM
    else:
        values = _numbers(state["env.xregs"])
        general = dict(zip([*(f"x{n}" for n in range(31)), "sp"], values, strict=False))
        general |= _named(state, {"pc": "env.pc"}) | {"pstate": status}
        architecture = Architecture.AARCH64
    return CpuRegisters(
        architecture,
        index,
        MappingProxyType(general),
        MappingProxyType(_arm_control(state)),
        MappingProxyType({}),
        _arm_vectors(state),
    )


def _arm_control(state: State) -> dict[str, int]:
    registers = dict(
        zip(
            _numbers(state.get("cpreg_vmstate_indexes")),
            _numbers(state.get("cpreg_vmstate_values")),
            strict=False,
        )
    )
    control = {}
    for name, (op0, op1, crn, crm, op2) in _ARM_CONTROL.items():
        key = _ARM_SYSTEM_64 | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
        if key in registers:
            control[name] = registers[key]
    for what in ("elr_el", "sp_el"):
        for level, value in enumerate(_numbers(state.get(f"env.{what}"))):
            control[f"{what}{level}"] = value
    return control


def _arm_vectors(state: State) -> tuple[int, ...]:
    floating = state.subsection("cpu/vfp")
    if floating is None:
        return ()
    pairs = (_numbers(floating.get(f"env.vfp.zregs[{n}].d")) for n in range(32))
    return tuple(_wide(*pair) for pair in pairs if len(pair) == 2)


def _named(state: State, names: Mapping[str, str]) -> dict[str, int]:
    """Return the numbers in these fields, under the given names."""
    values = {name: _number(state.get(field)) for name, field in names.items()}
    return {name: value for name, value in values.items() if value is not None}


def _number(value: Value) -> int | None:
    return value if isinstance(value, int) else None


def _numbers(value: Value) -> Sequence[int]:
    values = value if isinstance(value, tuple) else ()
    return [item for item in values if isinstance(item, int)]


def _states(value: Value) -> Sequence[State]:
    values = value if isinstance(value, tuple) else ()
    return [item for item in values if isinstance(item, State)]


def _wide(low: Value, high: Value) -> int:
    return (_number(low) or 0) | (_number(high) or 0) << 64
