"""Device state of real files, compared with what QEMU says of the same guest."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.format.device.cpu import Architecture, CpuRegisters, cpu_registers
from pyqmigrate.format.device.values import Device, State
from pyqmigrate.snapshot.devices import Devices, devices
from tests.harness import machine as machines
from tests.harness.device_twin import encode, fields_of
from tests.harness.machine import GuestRam, Qemu
from tests.harness.pattern_guest import build
from tests.harness.registers import registers_said
from tests.harness.sequential_saves import SequentialQemu
from tests.harness.unpacked import emulator

pytestmark = pytest.mark.qemu

RAM = 16 << 20
DISKS = ["-blockdev", "null-co,node-name=a", "-blockdev", "null-co,node-name=b"]
CARDS = [
    "-device",
    "VGA",
    "-device",
    "e1000",
    "-device",
    "virtio-net-pci",
    "-device",
    "virtio-blk-pci,drive=a",
    "-device",
    "qemu-xhci",
    "-device",
    "usb-tablet",
    *DISKS,
]
EXTRA = {
    "pc": [*CARDS, "-device", "ide-hd,drive=b"],
    "q35": [*CARDS, "-device", "ide-hd,drive=b", "-device", "pcie-root-port"],
    "microvm": ["-device", "virtio-blk-device,drive=a", "-device", "virtio-net-device", *DISKS],
}
# Devices that write a part of their state by themselves: their description has no fields for it.
OWN_WORDS = {"virtio", "msix state"}
_ROM_BAR = 6  # firmware takes the address of a ROM away again


def wait_for(what: Any, limit: float = 20) -> None:
    deadline = time.monotonic() + limit
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def hmp(vm: Qemu, line: str) -> str:
    return str(vm.execute("human-monitor-command", {"command-line": line}))


def body_of(path: Path, device: Device) -> bytes:
    with path.open("rb") as file:
        file.seek(device.body_offset)
        return file.read(device.body_length)


def check_coverage(path: Path, found: Devices, own_words: set[str]) -> None:
    """Every byte of every section is in the tree, and known, but for what devices say alone."""
    assert found.devices
    for device in found.devices:
        assert device.explained, device.name
        assert encode(device.state) == body_of(path, device), device.name
        opaque = {field.type for field in fields_of(device) if field.opaque}
        assert opaque <= own_words, device.name


def check_x86(cpu: CpuRegisters, text: str) -> None:
    said = registers_said(text)
    wide = "rax" in said
    legacy = ["ax", "bx", "cx", "dx", "si", "di", "bp", "sp", "ip"]
    names = {f"r{n}": ("r" if wide else "e") + n for n in legacy}
    names |= {f"r{n}": f"r{n}" for n in range(8, 16)} if wide else {}
    names["rflags"] = "rfl" if wide else "efl"
    assert {n: cpu.general[n] for n in names} == {n: said[s] for n, s in names.items()}
    control = ["cr0", "cr2", "cr3", "cr4", "efer", "dr0", "dr6", "dr7", "mxcsr"]
    assert {n: cpu.control[n] for n in control} == {n: said[n] for n in control}
    bases = {name: segment.base for name, segment in cpu.segments.items()}
    assert bases == {name: said[f"{name}.base"] for name in bases}
    assert len(bases) == 10
    shown = 16 if wide else 8
    assert list(cpu.vectors[:shown]) == [said[f"xmm{n:02}"] for n in range(shown)]


@pytest.fixture(params=["pc", "q35", "microvm"])
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_registers_of_a_busy_guest_are_those_of_qemu(machine: str, disk: Path) -> None:
    serial, path = disk / "serial", disk / "s"
    image = build(disk, RAM)
    extra = [*EXTRA[machine], "-smp", "2"]
    with (
        GuestRam(RAM) as ram,
        Qemu(ram, machine=machine, run=True, bios=image, serial=serial, extra=extra) as vm,
    ):
        wait_for(lambda: serial.exists() and serial.stat().st_size > 2)
        vm.save(path)
        [first, second] = hmp(vm, "info registers -a").split("CPU#1")
    found = devices(path)
    check_coverage(path, found, OWN_WORDS)
    cpus = cpu_registers(found.devices)
    assert [cpu.architecture for cpu in cpus] == [Architecture.X86_64] * 2
    assert cpus[0].general["rip"] >> 16 == 0xFFFF
    check_x86(cpus[0], first)
    check_x86(cpus[1], second)


def test_registers_of_64_bits_are_those_of_qemu(disk: Path) -> None:
    serial, path = disk / "serial", disk / "s"
    source = Path(__file__).parents[1] / "harness/registers.s"
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
        wait_for(lambda: serial.exists() and serial.read_bytes() == b"R")
        time.sleep(0.1)
        vm.execute("stop")
        text = hmp(vm, "info registers")
        vm.save(path)
    found = devices(path)
    check_coverage(path, found, OWN_WORDS)
    [cpu] = cpu_registers(found.devices)
    check_x86(cpu, text)
    assert len({cpu.general[n] for n in cpu.general}) == 18, "each tells which one it is"
    assert cpu.control["cr3"] == 0x1000
    assert cpu.segments["fs"].base >> 32 == 0xFFFF8880
    assert cpu.vectors[3] == 0x99AABBCCDDEEFF001122334455667788
    assert cpu.control["lstar"] & 0xFFFFFFFF == 0x01500000
    assert cpu.control["kernel_gs_base"] & 0xFFFFFFFF == 0x06600000


def config_of(device: Device) -> bytes | None:
    configs = [f.value for f in fields_of(device) if f.type == "pci config"]
    return configs[0] if configs and isinstance(configs[0], bytes) else None


def bars_of(config: bytes) -> dict[int, int]:
    """Address of each BAR that firmware has set, by number."""
    words = [int.from_bytes(config[at : at + 4], "little") for at in range(0x10, 0x28, 4)]
    bars: dict[int, int] = {}
    number = 0
    while number < 6:
        low = words[number]
        is_io, is_wide = bool(low & 1), low & 7 == 4
        high = words[number + 1] << 32 if is_wide and number < 5 else 0
        bars[number] = (low & ~(3 if is_io else 15)) | high
        number += 2 if is_wide else 1
    return bars


def test_pci_devices_are_those_of_qemu(module_disk: Path) -> None:
    path = module_disk / "pci"
    with GuestRam(RAM) as ram, Qemu(ram, machine="q35", run=True, extra=EXTRA["q35"]) as vm:

        def pci() -> list[dict[str, Any]]:
            [bus] = [b for b in vm.execute("query-pci") if b["bus"] == 0]
            return list(bus["devices"])

        wait_for(
            lambda: all(
                region["address"] != -1
                for device in pci()
                for region in device["regions"]
                if region["bar"] < _ROM_BAR
            )
        )
        time.sleep(0.2)
        vm.execute("stop")
        said = pci()
        clock = vm.execute("qom-get", {"path": "/machine", "property": "rtc-time"})
        vm.save(path)
    found = devices(path)
    check_coverage(path, found, OWN_WORDS)
    configs = {
        device.name.split("/")[0]: (device.name, config)
        for device in found.devices
        if (config := config_of(device)) is not None
    }
    virtio = 0
    compared = 0
    for device in said:
        place = f"0000:00:{device['slot']:02x}.{device['function']}"
        if device["id"]["vendor"] == 0x1AF4:
            virtio += 1
            assert any(d.name.startswith(f"{place}/virtio-") for d in found.devices)
            continue
        _, config = configs[place]
        assert int.from_bytes(config[0:2], "little") == device["id"]["vendor"]
        assert int.from_bytes(config[2:4], "little") == device["id"]["device"]
        bars = bars_of(config)
        for region in device["regions"]:
            if region["bar"] < _ROM_BAR:
                assert bars[region["bar"]] == region["address"], (place, region)
                compared += 1
    assert virtio == 2
    assert compared >= 6
    names = {name.split("/")[1] for name, _ in configs.values()}
    assert {"vga", "e1000", "ich9_ahci", "xhci", "pcie-root-port"} <= names
    check_clock(found, clock)
    check_timer(found)


def check_clock(found: Devices, clock: dict[str, int]) -> None:
    [rtc] = [device for device in found.devices if device.name == "mc146818rtc"]
    cmos = rtc.state["cmos_data"]
    assert isinstance(cmos, bytes)

    def decimal(at: int) -> int:
        return cmos[at] // 16 * 10 + cmos[at] % 16

    day = (decimal(0x32) * 100 + decimal(9), decimal(8), decimal(7))
    assert day == (clock["tm_year"] + 1900, clock["tm_mon"] + 1, clock["tm_mday"])


def check_timer(found: Devices) -> None:
    [pit] = [device for device in found.devices if device.name == "i8254"]
    channels = pit.state["channels"]
    assert isinstance(channels, tuple) and len(channels) == 3
    for channel in channels:
        assert isinstance(channel, State)
        count, mode = channel["count"], channel["mode"]
        assert isinstance(count, int) and 0 < count <= 0x10000
        assert isinstance(mode, int) and mode <= 5


def test_guest_that_was_never_started_has_the_state_of_reset(machine: str, disk: Path) -> None:
    path = disk / "s"
    with GuestRam(RAM) as ram, Qemu(ram, machine=machine, extra=EXTRA[machine]) as vm:
        vm.save(path)
        text = hmp(vm, "info registers")
    found = devices(path)
    check_coverage(path, found, OWN_WORDS)
    [cpu] = cpu_registers(found.devices)
    check_x86(cpu, text)
    assert (cpu.general["rip"], cpu.segments["cs"].base) == (0xFFF0, 0xFFFF0000)
    [state] = [device for device in found.devices if device.name == "globalstate"]
    runstate = state.state["runstate"]
    assert isinstance(runstate, bytes) and runstate.rstrip(b"\0") == b"prelaunch"


def test_one_device_is_chosen_by_name_and_by_section(module_disk: Path) -> None:
    path = module_disk / "pci"
    if not path.exists():
        with GuestRam(RAM) as ram, Qemu(ram, machine="q35", extra=EXTRA["q35"]) as vm:
            vm.save(path)
    [cpu] = devices(path, name="cpu").devices
    assert devices(path, section_id=cpu.section_id).devices == (cpu,)


@dataclass
class Kinds:
    """The same guest in three kinds of files."""

    mapped: Devices
    sequential: Devices
    alone: Devices


@pytest.fixture(scope="module")
def kinds(module_disk: Path) -> Kinds:
    paths = [module_disk / name for name in ("mapped", "sequential", "alone")]
    with GuestRam(RAM) as ram, SequentialQemu(ram, extra=EXTRA["pc"]) as vm:
        vm.execute("xen-save-devices-state", {"filename": str(paths[2]), "live": False})
        vm.save(paths[1])
    with GuestRam(RAM) as ram, Qemu(ram, extra=EXTRA["pc"]) as vm:
        vm.save(paths[0])
    return Kinds(*(devices(path) for path in paths))


def shape(found: Devices) -> list[tuple[str, int, int]]:
    return [(d.name, d.instance_id, d.body_length) for d in found.devices]


def test_sequential_stream_has_the_same_devices(kinds: Kinds) -> None:
    assert shape(kinds.sequential) == shape(kinds.mapped)
    assert [cpu.general for cpu in cpu_registers(kinds.sequential.devices)] == [
        cpu.general for cpu in cpu_registers(kinds.mapped.devices)
    ]


def test_state_alone_lists_its_sections_without_meaning(kinds: Kinds) -> None:
    assert not kinds.alone.described
    assert kinds.alone.machine is None
    names = {device.name for device in kinds.mapped.devices}
    assert {device.name for device in kinds.alone.devices} == names
    assert all(field.opaque for device in kinds.alone.devices for field in fields_of(device))


def test_stream_without_description_lists_its_sections(disk: Path) -> None:
    path = disk / "s"
    with GuestRam(RAM) as ram, Qemu(ram, extra=["-machine", "suppress-vmdesc=on"]) as vm:
        vm.save(path)
    found = devices(path)
    assert not found.described
    assert {"timer", "cpu", "i8254", "globalstate"} <= {device.name for device in found.devices}


def other(monkeypatch: pytest.MonkeyPatch, target: str, machine: str, block: str) -> None:
    """Make Qemu start another target."""
    monkeypatch.setattr(machines, "BINARY", emulator(target))
    monkeypatch.setitem(machines.RAM_BLOCK, machine, block)


def test_registers_of_aarch64_are_those_of_qemu(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other(monkeypatch, "aarch64", "virt", "mach-virt.ram")
    base = 0x4000_0000
    code = [0xD2800000 | (0x1000 + n) << 5 | n for n in range(31)]  # movz xN, 0x1000 + N
    code += [0x9100003F, 0xD5182021, 0x14000000]  # mov sp, x1; msr ttbr1_el1, x1; b .
    extra = ["-cpu", "max", "-device", f"loader,addr={base:#x},cpu-num=0"]
    path = disk / "s"
    with GuestRam(RAM) as ram, Qemu(ram, machine="virt", extra=extra) as vm:
        ram.memory[: 4 * len(code)] = b"".join(word.to_bytes(4, "little") for word in code)
        vm.execute("cont")
        wait_for(lambda: f"PC={base + 4 * len(code) - 4:016x}" in hmp(vm, "info registers"))
        vm.save(path)
        text = hmp(vm, "info registers")
    found = devices(path)
    check_coverage(path, found, OWN_WORDS)
    [cpu] = cpu_registers(found.devices)
    said = {name: int(value, 16) for name, value in re.findall(r"(\w+)=([0-9a-f]+)", text)}
    assert cpu.architecture is Architecture.AARCH64
    assert [cpu.general[f"x{n}"] for n in range(31)] == [said[f"X{n:02}"] for n in range(31)]
    assert cpu.general["x30"] == 0x101E
    assert (cpu.general["pc"], cpu.general["sp"]) == (said["PC"], said["SP"])
    assert cpu.general["pstate"] == said["PSTATE"]
    assert cpu.control["ttbr1_el1"] == 0x1001


def test_big_endian_target_is_decoded_likewise(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other(monkeypatch, "ppc64", "pseries", "ppc_spapr.ram")
    path = disk / "s"
    with GuestRam(256 << 20) as ram, Qemu(ram, machine="pseries") as vm:
        vm.save(path)
        text = hmp(vm, "info registers")
    found = devices(path)
    check_coverage(path, found, {"fpr", "avr", "vsr", "slbe", "cpu/altivec/vscr"})
    [cpu] = [device for device in found.devices if device.name == "cpu"]
    said = re.search(r"NIP ([0-9a-f]+)", text)
    assert said is not None
    assert cpu.state["env.nip"] == int(said[1], 16)
