"""CPU registers as the notes of an ELF core, for gdb, crash, drgn and volatility.

A ``CORE`` note of type NT_PRSTATUS for each CPU, as Linux lays it out; for AArch64 an NT_FPREGSET
too; then, for x86, QEMU's own note ``QEMU``, which has the control registers. They are those of
``dump-guest-memory`` with two exceptions: an x86 CPU outside of 64-bit mode has a 64-bit NT_PRSTATUS,
since the file is a 64-bit one, and SVE registers have no note.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from pyqmigrate.format.device.cpu import Architecture, CpuRegisters, Segment
from pyqmigrate.format.device.values import Device
from pyqmigrate.format.dump.elf import encode_note

__all__ = ["cpu_notes"]

_PRSTATUS, _FPREGSET = 1, 2
_QEMU = 0

# 32 bytes about a signal; the thread's number; 76 bytes about its parents and times; registers.
_STATUS = "<32xI76x"
_X86_STATUS = struct.Struct(f"{_STATUS}27Q8x")
_X86_ORDER = (
    "r15",
    "r14",
    "r13",
    "r12",
    "rbp",
    "rbx",
    "r11",
    "r10",
    "r9",
    "r8",
    "rax",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "orig_rax",
    "rip",
    "cs",
    "rflags",
    "rsp",
    "ss",
    "fs_base",
    "gs_base",
    "ds",
    "es",
    "fs",
    "gs",
)
_ARM_STATUS = struct.Struct(f"{_STATUS}34Qi4x")
_ARM_ORDER = (*(f"x{n}" for n in range(31)), "sp", "pc", "pstate")
_ARM_FLOATING = struct.Struct("<64QII8x")

_QEMU_STATE = struct.Struct("<II18Q")
_QEMU_SEGMENT = struct.Struct("<IIIIQ")
_QEMU_CONTROL = struct.Struct("<6Q")
_QEMU_VERSION, _QEMU_LENGTH = 1, 440
_QEMU_ORDER = (
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rsp",
    "rbp",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "rip",
    "rflags",
)
_QEMU_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt")

_FPSR = 0xF800_009F  # the bits of FPSCR that AArch64 has in FPSR; the rest is FPCR


def cpu_notes(cpus: Iterable[CpuRegisters], devices: Iterable[Device] = ()) -> list[bytes]:
    """Return the notes of all CPUs, except those in 32-bit Arm state.

    ``devices`` has the floating point status of AArch64, which is zero otherwise.
    """
    status = {
        device.instance_id: _floating_status(device) for device in devices if device.name == "cpu"
    }
    common, of_qemu = [], []
    for cpu in cpus:
        if cpu.architecture in (Architecture.X86_64, Architecture.I386):
            common.append(encode_note("CORE", _PRSTATUS, _x86_status(cpu)))
            of_qemu.append(encode_note("QEMU", _QEMU, _qemu_state(cpu)))
        elif cpu.architecture is Architecture.AARCH64:
            values = [cpu.general.get(name, 0) for name in _ARM_ORDER]
            common.append(
                encode_note("CORE", _PRSTATUS, _ARM_STATUS.pack(cpu.index + 1, *values, 1))
            )
            floating = _arm_floating(cpu, *status.get(cpu.index, (0, 0)))
            common.append(encode_note("CORE", _FPREGSET, floating))
    return common + of_qemu


def _x86_status(cpu: CpuRegisters) -> bytes:
    values = dict(_wide_names(cpu))
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        values[name] = _segment(cpu, name).selector
    for name in ("fs", "gs"):
        values[f"{name}_base"] = _segment(cpu, name).base
    return _X86_STATUS.pack(cpu.index + 1, *(values.get(name, 0) for name in _X86_ORDER))


def _qemu_state(cpu: CpuRegisters) -> bytes:
    values = _wide_names(cpu)
    control = [cpu.control.get(name, 0) for name in ("cr0", "cr1", "cr2", "cr3", "cr4")]
    segments = [_segment(cpu, name) for name in _QEMU_SEGMENTS]
    return b"".join(
        [
            _QEMU_STATE.pack(
                _QEMU_VERSION, _QEMU_LENGTH, *(values.get(name, 0) for name in _QEMU_ORDER)
            ),
            *(_QEMU_SEGMENT.pack(s.selector, s.limit, s.flags, 0, s.base) for s in segments),
            _QEMU_CONTROL.pack(*control, cpu.control.get("kernel_gs_base", 0)),
        ]
    )


def _arm_floating(cpu: CpuRegisters, fpsr: int, fpcr: int) -> bytes:
    vectors = [*cpu.vectors, *[0] * 32][:32]
    halves = [half for vector in vectors for half in (vector & (1 << 64) - 1, vector >> 64)]
    return _ARM_FLOATING.pack(*halves, fpsr, fpcr)


def _floating_status(device: Device) -> tuple[int, int]:
    """Return FPSR and FPCR of an AArch64 CPU: one word or, since QEMU 9.1, two if one is too small."""
    for state in device.states():
        fpsr, fpcr = state.get("env.vfp.fpsr"), state.get("env.vfp.fpcr")
        if isinstance(fpsr, int) and isinstance(fpcr, int):
            return fpsr & 0xFFFF_FFFF, fpcr & 0xFFFF_FFFF
    for state in device.states():
        both = state.get("fpscr")
        if isinstance(both, int):
            return both & _FPSR, both & ~_FPSR & 0xFFFF_FFFF
    return 0, 0


def _wide_names(cpu: CpuRegisters) -> Mapping[str, int]:
    """Return the general registers by their 64-bit names."""
    if cpu.architecture is Architecture.X86_64:
        return cpu.general
    return {f"r{name[1:]}": value for name, value in cpu.general.items()}


def _segment(cpu: CpuRegisters, name: str) -> Segment:
    return cpu.segments.get(name, Segment(0, 0, 0, 0))
