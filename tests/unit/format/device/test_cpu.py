"""CPU registers found in decoded sections, by the names of manuals."""

from __future__ import annotations

import pytest

from pyqmigrate.format.device.cpu import (
    Architecture,
    Segment,
    cpu_registers,
    power_is_little_endian,
)
from pyqmigrate.format.device.values import Device
from tests.harness.cpu_sections import ARM, X86, device, fields, state


def test_x86_registers_are_in_the_order_of_machine_code() -> None:
    [cpu] = cpu_registers([device(fields(X86))])
    assert cpu.architecture is Architecture.X86_64
    names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r15"]
    assert [cpu.general[name] for name in names] == [*range(100, 109), 115]
    assert (cpu.general["rip"], cpu.general["rflags"]) == (0xFFF0, 2)


def test_x86_segments_have_their_bases() -> None:
    [cpu] = cpu_registers([device(fields(X86))])
    assert [cpu.segments[s].base for s in ("es", "cs", "ss", "ds", "fs", "gs")] == [*range(6)]
    assert cpu.segments["gdt"] == Segment(8, 0x777, 0xFFFF, 0x9300)
    assert "tr" not in cpu.segments


def test_x86_control_registers_that_are_not_described_are_missing() -> None:
    [cpu] = cpu_registers([device(fields(X86))])
    assert (cpu.control["cr3"], cpu.control["dr7"]) == (0x1000, 7)
    assert "cr2" not in cpu.control


def test_vector_registers_are_wide_numbers() -> None:
    [cpu] = cpu_registers([device(fields(X86))])
    assert cpu.vectors == (2 << 64 | 1,)


def test_eight_registers_are_a_cpu_of_32_bits() -> None:
    [cpu] = cpu_registers([device(fields(X86 | {"env.regs": tuple(range(8))}))])
    assert cpu.architecture is Architecture.I386
    assert (cpu.general["eax"], cpu.general["edi"], cpu.general["eip"]) == (0, 7, 0xFFF0)
    assert "r8" not in cpu.general


def test_aarch64_registers_end_with_the_stack_pointer() -> None:
    [cpu] = cpu_registers([device(fields(ARM))])
    assert cpu.architecture is Architecture.AARCH64
    assert (cpu.general["x0"], cpu.general["x30"], cpu.general["sp"]) == (200, 230, 231)
    assert (cpu.general["pc"], cpu.general["pstate"]) == (0x40000000, 0x3C5)


def test_aarch64_system_registers_are_found_by_their_encoding() -> None:
    [cpu] = cpu_registers([device(fields(ARM))])
    assert (cpu.control["ttbr0_el1"], cpu.control["ttbr1_el1"]) == (0xAAA, 0xBBB)
    assert cpu.control["elr_el1"] == 11


def test_arm_in_32_bits_has_the_other_registers() -> None:
    [cpu] = cpu_registers([device(fields(ARM | {"cpsr": 0x1D3}))])
    assert cpu.architecture is Architecture.ARM
    assert (cpu.general["r15"], cpu.general["cpsr"]) == (15, 0x1D3)


def test_cpus_are_in_the_order_of_their_numbers() -> None:
    devices = [device(fields(X86), instance=n) for n in (2, 0, 1)]
    assert [cpu.index for cpu in cpu_registers(devices)] == [0, 1, 2]


def test_what_is_not_a_known_cpu_is_left_out() -> None:
    unknown = [
        device(fields(X86), name="apic"),
        device(state(env__msr=1)),
        device(fields(X86 | {"env.regs": (1, 2, 3)})),
        device(fields(X86 | {"env.regs": b"opaque"})),
        device(fields(ARM | {"cpsr": b"abcd"})),
    ]
    assert cpu_registers(unknown) == ()


def power(lpcr: int, msr: int) -> Device:
    registers = [0] * 1024
    registers[318] = lpcr
    return device(fields({"env.spr": tuple(registers), "env.msr": msr}))


@pytest.mark.parametrize(
    ("lpcr", "msr", "little"),
    [(0x20008, 1 << 63, False), (0x2020008, 1 << 63, True), (0, 0x8000000000000001, True)],
)
def test_power_guest_is_little_endian_when_interrupts_or_code_are(
    lpcr: int, msr: int, little: bool
) -> None:
    assert power_is_little_endian([power(lpcr, msr)]) is little


def test_power_guest_without_registers_is_not_taken_for_little_endian() -> None:
    assert not power_is_little_endian([])
    assert not power_is_little_endian([device(fields({"env.msr": b"", "env.spr": ()}))])
    assert not power_is_little_endian([device(fields(X86))])
