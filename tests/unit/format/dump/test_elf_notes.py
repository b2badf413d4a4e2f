"""Registers as notes; what they are is compared with QEMU's own in tests/qemu."""

from __future__ import annotations

import struct

from pyqmigrate.format.device.cpu import cpu_registers
from pyqmigrate.format.dump.elf_notes import cpu_notes
from pyqmigrate.format.dump.vmcoreinfo import HEAD_LENGTH, note_length
from tests.harness.cpu_sections import ARM, X86, device, fields

HEAD = 12 + 8  # lengths and kind; "CORE" or "QEMU", padded


def test_x86_has_its_registers_and_qemus_note_last() -> None:
    devices = [device(fields(X86), instance=n) for n in range(2)]
    status, _, state, _ = cpu_notes(cpu_registers(devices))
    assert [len(status), len(state)] == [HEAD + 336, HEAD + 440]
    assert struct.unpack_from("<I", status, HEAD + 32) == (1,)
    assert struct.unpack_from("<2Q", status, HEAD + 112) == (115, 114)  # r15, r14
    assert struct.unpack_from("<Q", status, HEAD + 112 + 16 * 8) == (0xFFF0,)  # rip
    assert struct.unpack_from("<II", state, HEAD) == (1, 440)
    assert struct.unpack_from("<Q", state, HEAD + 440 - 24) == (0x1000,)  # cr3


def test_x86_without_64_bits_has_the_same_note() -> None:
    [cpu] = cpu_registers([device(fields(X86 | {"env.regs": tuple(range(100, 108))}))])
    status, _ = cpu_notes([cpu])
    assert len(status) == HEAD + 336
    assert struct.unpack_from("<Q", status, HEAD + 112 + 10 * 8) == (100,)  # rax


def test_aarch64_has_floating_point_beside() -> None:
    status, floating = cpu_notes(cpu_registers([device(fields(ARM))]))
    assert [len(status), len(floating)] == [HEAD + 392, HEAD + 528]
    assert struct.unpack_from("<34Q", status, HEAD + 112) == (*range(200, 232), 0x40000000, 0x3C5)


def test_floating_point_status_is_taken_apart_where_it_is_one_word() -> None:
    devices = [device(fields(ARM | {"fpscr": 0x0300_0011}))]
    _, floating = cpu_notes(cpu_registers(devices), devices)
    assert struct.unpack_from("<II", floating, HEAD + 512) == (0x11, 0x0300_0000)


def test_arm_in_32_bits_has_no_notes() -> None:
    assert cpu_notes(cpu_registers([device(fields(ARM | {"cpsr": 0x1D3}))])) == []


def vmcoreinfo(text: bytes, *, kind: int = 0, order: str = "<") -> bytes:
    return struct.pack(f"{order}III", 11, len(text), kind) + b"VMCOREINFO\0\0" + text


def test_vmcoreinfo_is_known_by_its_head() -> None:
    note = vmcoreinfo(b"OSRELEASE=6.1\nX=1")
    assert note_length(note[:HEAD_LENGTH]) == 24 + 20
    assert note_length(note[: HEAD_LENGTH - 1]) is None
    assert note_length(vmcoreinfo(b"OSRELEASE=6.1", order=">"), big_endian=True) == 24 + 16
    assert note_length(vmcoreinfo(b"OSRELEASE=6.1", order=">")) is None
    assert note_length(vmcoreinfo(b"OSRELEASE=6.1", kind=1)) is None
    assert note_length(vmcoreinfo(b"RELEASE=6.1.0")) is None
    assert note_length(vmcoreinfo(b"OSRELEASE=" + bytes(1 << 17))) is None
