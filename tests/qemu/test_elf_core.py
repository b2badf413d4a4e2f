"""ELF cores and LiME files of real guests, compared with what QEMU itself dumps of them."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.export.convert import convert
from pyqmigrate.export.image import ImageReport
from pyqmigrate.vm.outgoing.save import save
from tests.harness.contents import Contents, fill
from tests.harness.machine import GuestRam, Qemu
from tests.harness.other_targets import TARGETS, OtherQemu
from tests.harness.pattern_guest import build
from tests.harness.physical import Note, Physical
from tests.harness.registers import registers_said
from tests.harness.sequential_saves import SequentialQemu

pytestmark = pytest.mark.qemu

RAM = 16 << 20
CONTROL = ("cr0", "cr2", "cr3", "cr4")


def dump(vm: Qemu, path: Path) -> Physical:
    """QEMU's own dump; it writes every page, so of small guests only."""
    vm.execute("dump-guest-memory", {"paging": False, "protocol": f"file:{path}"})
    return read_dump(path)


def read_dump(path: Path) -> Physical:
    # QEMU gives the ELF header a length that readers take offence at.
    with path.open("r+b") as file:
        file.seek(0x34)
        file.write(struct.pack("<H", 64))
    return Physical.of_elf(path)


def export(source: Path, target: Path, form: str) -> tuple[Physical, ImageReport]:
    report = convert(source, target, to=form)
    assert isinstance(report, ImageReport)
    read = Physical.of_elf if form == "elf" else Physical.of_lime
    return read(target), report


def wait_for_byte(serial: Path, n: int) -> None:
    """Waits until the guest has said so many bytes, and has gone on for a moment."""
    deadline = time.monotonic() + 60
    while not serial.exists() or serial.stat().st_size < n:
        assert time.monotonic() < deadline, "the guest does not run"
        time.sleep(0.01)
    time.sleep(0.1)


def named(notes: tuple[Note, ...], name: str) -> list[bytes]:
    return [note.content for note in notes if note.name == name]


@pytest.mark.parametrize("machine", ["pc", "q35", "microvm"])
def test_memory_and_control_registers_are_those_of_qemus_dump(machine: str, disk: Path) -> None:
    serial, image = disk / "serial", build(disk, RAM)
    with (
        GuestRam(RAM) as ram,
        Qemu(ram, machine=machine, run=True, bios=image, serial=serial, extra=["-smp", "2"]) as vm,
    ):
        wait_for_byte(serial, 2)
        vm.execute("stop")
        theirs = dump(vm, disk / "dump")
        vm.save(disk / "s")
    elf, report = export(disk / "s", disk / "elf", "elf")
    assert elf.all() == theirs.all()
    assert elf.machine == "EM_X86_64"
    assert report.cpus == len(named(elf.notes, "CORE")) == 2
    assert named(elf.notes, "QEMU") == named(theirs.notes, "QEMU")
    lime, _ = export(disk / "s", disk / "lime", "lime")
    assert lime.all() == theirs.all()


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_direct_save_of_ram_that_is_split_elsewhere_is_as_qemus_dump(
    machine: str, disk: Path
) -> None:
    """Its device state has no description of its own."""
    serial, length = disk / "serial", 24 << 20
    memory = [
        "-machine",
        f"{machine},memory-backend=pc.ram,max-ram-below-4g=16M",
        "-m",
        "24M",
        "-object",
        "memory-backend-ram,id=pc.ram,size=24M",
    ]
    monitor = ["-qmp", f"unix:{disk}/save.qmp,server=on,wait=off"]
    with (
        GuestRam(length) as ram,
        Qemu(
            ram,
            machine=machine,
            run=True,
            bios=build(disk, 16 << 20),
            memory=memory,
            serial=serial,
            extra=monitor,
        ) as vm,
    ):
        wait_for_byte(serial, 2)
        vm.execute("stop")
        theirs = dump(vm, disk / "dump")
        report = asyncio.run(save(disk / "save.qmp", disk / "s", engine="direct"))
        assert report.run_state_after == "paused"
    elf, report_of_elf = export(disk / "s", disk / "elf", "elf")
    assert elf.all() == theirs.all()
    assert any(one.address == 4 << 30 for one in report_of_elf.ranges)
    lime, _ = export(disk / "s", disk / "lime", "lime")
    assert lime.all() == theirs.all()


def test_registers_of_64_bits_are_byte_for_byte_those_of_qemus_dump(disk: Path) -> None:
    serial, source = disk / "serial", Path(__file__).parents[1] / "harness/registers.s"
    made, image = disk / "r.o", disk / "r.bin"
    subprocess.run(["as", "--64", "-o", made, source], check=True)
    subprocess.run(
        [
            "ld",
            "-m",
            "elf_x86_64",
            "--oformat",
            "binary",
            "-Ttext=0xffff0000",
            "-e",
            "start",
            "-o",
            image,
            made,
        ],
        check=True,
    )
    with (
        GuestRam(RAM) as ram,
        Qemu(ram, run=True, bios=image, serial=serial, extra=["-cpu", "max"]) as vm,
    ):
        wait_for_byte(serial, 1)
        vm.execute("stop")
        theirs = dump(vm, disk / "dump")
        said = registers_said(
            vm.execute("human-monitor-command", {"command-line": "info registers"})
        )
        vm.save(disk / "s")
    elf, _ = export(disk / "s", disk / "elf", "elf")
    assert elf.notes == theirs.notes
    [state] = named(elf.notes, "QEMU")
    control = struct.unpack_from("<6Q", state, len(state) - 48)
    assert [control[0], *control[2:5]] == [said[name] for name in CONTROL]


# movz x0..x28; CPACR_EL1 lets floating point in; fmov d5, x7; FPCR and FPSR; b .
CODE = [
    *(0xD2800000 | (0x1100 + n) << 5 | n for n in range(29)),
    0xD2A0061D,
    0xD518105D,
    0xD5033FDF,
    0x9E6700E5,
    0xD2A0201E,
    0xD51B441E,
    0xD280003E,
    0xD51B443E,
    0x14000000,
]
CODE_AT = 0x40200000


def test_aarch64_has_memory_and_notes_of_qemus_dump(disk: Path) -> None:
    target, code = TARGETS["aarch64"], disk / "code"
    code.write_bytes(struct.pack(f"<{len(CODE)}I", *CODE))
    extra = ["-smp", "2", "-device", f"loader,file={code},addr={CODE_AT},cpu-num=0,force-raw=on"]
    with GuestRam(target.length) as ram, OtherQemu(target, ram, extra) as vm:
        fill(memoryview(ram.memory)[32 << 20 :], Contents.SPECKLED, seed=3)
        with vm.connect() as qmp:
            qmp.execute("cont")
            wait_for_end_of_code(qmp)
            qmp.execute("stop")
            qmp.execute("dump-guest-memory", {"paging": False, "protocol": f"file:{disk}/dump"})
        vm.save(disk / "s")
    theirs = read_dump(disk / "dump")
    elf, report = export(disk / "s", disk / "elf", "elf")
    assert (elf.machine, report.cpus) == ("EM_AARCH64", 2)
    assert elf.all() == theirs.all()
    assert elf.notes == theirs.notes
    status = elf.notes[0].content
    assert struct.unpack_from("<29Q", status, 112) == tuple(range(0x1100, 0x1100 + 29))
    lime, _ = export(disk / "s", disk / "lime", "lime")
    assert lime.all() == theirs.all()


def wait_for_end_of_code(qmp: Any) -> None:
    wait_for_said(qmp, f"PC={CODE_AT + 4 * (len(CODE) - 1):016x}")


def wait_for_said(qmp: Any, end: str) -> None:
    """Waits until the first CPU has come to the end of its code."""
    deadline = time.monotonic() + 30
    while end not in qmp.execute("human-monitor-command", {"command-line": "info registers"}):
        assert time.monotonic() < deadline, "the guest does not run"
        time.sleep(0.02)


def test_memory_above_4_gib_is_where_the_guest_sees_it(disk: Path) -> None:
    """Few of its pages are touched, each by QEMU's loader at its guest-physical address."""
    length, below, four = 5 << 30, 2 << 30, 4 << 30
    marks = [0x1000, below - 4096, four, four + length - below - 4096]
    memory = [
        "-machine",
        "q35,memory-backend=pc.ram",
        "-m",
        "5G",
        "-object",
        "memory-backend-ram,id=pc.ram,size=5G",
    ]
    for address in marks:
        memory += ["-device", f"loader,addr={address},data={address | 0xABC},data-len=8"]
    with GuestRam(1 << 20) as ram, Qemu(ram, machine="q35", memory=memory) as vm:
        vm.save(disk / "s")
    for form in ("elf", "lime"):
        image, report = export(disk / "s", disk / form, form)
        assert image.lengths[four] == length - below
        for address in marks:
            assert image.read(address, 8) == struct.pack("<Q", address | 0xABC)
        assert report.file_size > length > 100 * report.bytes_allocated, "it is sparse"


def test_sequential_stream_gives_the_same_files(disk: Path) -> None:
    with GuestRam(RAM) as ram, SequentialQemu(ram, extra=["-device", "VGA"]) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED, seed=4)
        theirs = dump(vm, disk / "dump")
        vm.save(disk / "s")
    assert export(disk / "s", disk / "elf", "elf")[0].all() == theirs.all()
    assert export(disk / "s", disk / "lime", "lime")[0].all() == theirs.all()


# li r3, H_SET_MODE; li r4, 1 (little); li r5, 4 (byte order); li r6, 0; li r7, 0; sc 1; b .
MODE = [0x3860031C, 0x38800001, 0x38A00004, 0x38C00000, 0x38E00000, 0x44000022, 0x48000000]


@pytest.mark.parametrize("order", ["little", "big"])
def test_power_guest_has_its_own_byte_order(order: str, disk: Path) -> None:
    """Firmware is big-endian; what it starts asks the hypervisor for the other order."""
    target, code = TARGETS["ppc64"], MODE if order == "little" else MODE[-1:]
    (disk / "code").write_bytes(bytes(0x100) + struct.pack(f">{len(code)}I", *code))
    note = struct.pack("<III" if order == "little" else ">III", 11, 20, 0)
    note += b"VMCOREINFO\0\0OSRELEASE=6.1-power\n\0"[:32]
    extra = ["-bios", str(disk / "code"), "-smp", "2"]
    with GuestRam(target.length) as ram, OtherQemu(target, ram, extra) as vm:
        with vm.connect() as qmp:
            qmp.execute("cont")
            end = f"NIP {0x100 + 4 * (len(code) - 1):016x}"
            wait_for_said(qmp, end)
            qmp.execute("stop")
        ram.memory[0x200000 : 0x200000 + len(note)] = note
        vm.save(disk / "s")
        with vm.connect() as qmp:
            qmp.execute("dump-guest-memory", {"paging": False, "protocol": f"file:{disk}/dump"})
    elf, _ = export(disk / "s", disk / "elf", "elf")
    assert elf.machine == "EM_PPC64"
    heads = [(disk / name).read_bytes()[:20] for name in ("elf", "dump")]
    assert heads[0] == heads[1]
    assert named(elf.notes, "VMCOREINFO") == [b"OSRELEASE=6.1-power\n"]
