"""Where snapshots are found to have their memory, compared with what QEMU says of the guest."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyqmigrate.errors import NotSupported
from pyqmigrate.export.convert import convert
from pyqmigrate.export.guest import Guest
from pyqmigrate.format.address_space.physical_map import parse_placement
from pyqmigrate.format.address_space.placement import Placement
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.vm.outgoing.save import save as save_vm
from tests.harness.flat_view import memory_seen
from tests.harness.machine import GuestRam, Qemu
from tests.harness.other_targets import TARGETS, OtherQemu, OtherTarget

pytestmark = pytest.mark.qemu


def backend(name: str, size: str) -> list[str]:
    return ["-object", f"memory-backend-ram,id={name},size={size}"]


def ram_of(machine: str, options: str, size: str = "5G", name: str = "pc.ram") -> list[str]:
    """RAM that nobody touches costs nothing, however large."""
    return [
        "-machine",
        f"{machine},memory-backend={name}{options}",
        "-m",
        size,
        *backend(name, size),
    ]


def nodes(machine: str, size: str, *sizes: str, order: str = "") -> list[str]:
    words = ["-machine", machine, "-m", size]
    for n, each in enumerate(sizes):
        words += backend(f"ram-node{n}", each)
    for n in order or "".join(map(str, range(len(sizes)))):
        words += ["-numa", f"node,memdev=ram-node{n}"]
    return words


# The machine, and its RAM in MiB or as words of a command line.
MEMORIES: dict[str, tuple[str, int | list[str]]] = {
    "pc": ("pc", 64),
    "q35": ("q35", 64),
    "microvm": ("microvm", 64),
    "isapc": ("isapc", 64),
    "pc-5G": ("pc", ram_of("pc", "")),
    "q35-5G": ("q35", ram_of("q35", "")),
    "microvm-5G": ("microvm", ram_of("microvm", "", name="microvm.ram")),
    "pc-3583M": ("pc", ram_of("pc", "", "3583M")),
    "pc-3584M": ("pc", ram_of("pc", "", "3584M")),
    "q35-2815M": ("q35", ram_of("q35", "", "2815M")),
    "q35-2816M": ("q35", ram_of("q35", "", "2816M")),
    "microvm-3072M": ("microvm", ram_of("microvm", "", "3072M", "microvm.ram")),
    "pc-2G-below": ("pc", ram_of("pc", ",max-ram-below-4g=2G")),
    "q35-1G-below": ("q35", ram_of("q35", ",max-ram-below-4g=1G")),
    "q35-3G-below": ("q35", ram_of("q35", ",max-ram-below-4g=3G")),
    "named-by-the-user": ("q35", ram_of("q35", "", "64M", "mem0")),
    "nodes": ("q35", nodes("q35", "96M", "32M", "64M")),
    "equal-nodes": ("pc", nodes("pc", "128M", "64M", "64M")),
    "nodes-5G": ("q35", nodes("q35", "5G", "1G", "4G")),
    "nodes-across": ("pc", nodes("pc", "5G", "2G", "2G", "1G", order="021")),
}
SHORT = {"q35-5G", "pc-2G-below", "nodes-5G"}


def named(ranges: tuple[Placement, ...]) -> list[Placement]:
    return [replace(one, block=one.block.rpartition("/")[2]) for one in ranges]


def look(path: Path, *given: str) -> Guest:
    with open_snapshot(path) as snapshot:
        return Guest.of(snapshot, [parse_placement(text) for text in given], None)


def seen_by(vm: Qemu) -> list[Placement]:
    text = vm.execute("human-monitor-command", {"command-line": "info mtree -f"})
    return list(memory_seen(text))


@contextlib.contextmanager
def guest(name: str) -> Iterator[Qemu]:
    """A paused guest of MEMORIES."""
    machine, memory = MEMORIES[name]
    words = memory if isinstance(memory, list) else None
    with (
        GuestRam(memory << 20 if isinstance(memory, int) else 1 << 20) as ram,
        Qemu(ram, machine=machine, memory=words) as vm,
    ):
        yield vm


def save(vm: Qemu, path: Path) -> None:
    vm.set_capabilities({"mapped-ram": True})
    vm.execute("migrate", {"uri": f"file:{path}"})
    assert vm.wait()["status"] == "completed"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.long]) for name in MEMORIES],
)
def test_memory_is_where_qemu_has_it(name: str, disk: Path) -> None:
    with guest(name) as vm:
        expected = seen_by(vm)
        save(vm, disk / "s")
    assert named(look(disk / "s").ranges) == expected


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "pc-2G-below" else [pytest.mark.long])
        for name, (machine, _) in MEMORIES.items()
        if machine != "isapc"
    ],
)
def test_memory_of_a_direct_save_is_where_qemu_has_it(name: str, disk: Path) -> None:
    with guest(name) as vm:
        expected = seen_by(vm)
        vm.qmp.close()
        report = asyncio.run(save_vm(vm.socket, disk / "s", engine="direct"))
        assert report.run_state_after == "prelaunch"
    assert named(look(disk / "s").ranges) == expected


@pytest.mark.parametrize("card", ["VGA", pytest.param("none", marks=pytest.mark.long)])
@pytest.mark.parametrize("machine", ["q35", pytest.param("pc", marks=pytest.mark.long)])
def test_memory_is_where_firmware_has_put_it(machine: str, card: str, disk: Path) -> None:
    """It copies itself into RAM, lets that be seen instead of ROM, and places the card's memory."""
    extra = [] if card == "none" else ["-device", card]
    with GuestRam(64 << 20) as ram, Qemu(ram, machine=machine, run=True, extra=extra) as vm:
        deadline = time.monotonic() + 30
        while not any(
            one.block == "pc.ram" and one.address <= 0xF0000 < one.end for one in seen_by(vm)
        ):
            assert time.monotonic() < deadline, "firmware does not run"
            time.sleep(0.05)
        time.sleep(0.2)
        vm.execute("stop")
        expected = seen_by(vm)
        vm.save(disk / "s")
    assert named(look(disk / "s").ranges) == expected
    assert any(one.block == "vga.vram" for one in expected) == (card == "VGA")


def test_module_that_was_plugged_in_is_placed_by_hand(disk: Path) -> None:
    memory = [
        "-machine",
        "q35,memory-backend=pc.ram",
        "-m",
        "64M,slots=2,maxmem=1G",
        *backend("pc.ram", "64M"),
        *backend("dimm", "128M"),
        "-device",
        "pc-dimm,memdev=dimm",
    ]
    with GuestRam(64 << 20) as ram, Qemu(ram, machine="q35", memory=memory) as vm:
        expected = seen_by(vm)
        vm.save(disk / "s")
    found = look(disk / "s")
    assert "dimm" in found.unplaced
    assert named(found.ranges) == [one for one in expected if one.block != "dimm"]
    by_hand = look(disk / "s", "dimm@0x100000000")
    assert named(by_hand.ranges) == expected


MACHINES = TARGETS | {
    "powernv": OtherTarget("ppc64", "powernv", "pnv.ram", length=1 << 30),
    "sbsa-ref": OtherTarget("aarch64", "sbsa-ref", "sbsa-ref.ram"),
    "sifive_u": OtherTarget(
        "riscv64", "sifive_u", "riscv.sifive.u.ram", ("-bios", "none"), 128 << 20
    ),
    "spike": OtherTarget("riscv64", "spike", "riscv.spike.ram", ("-bios", "none")),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("aarch64", "ppc64") else [pytest.mark.long])
        for name in MACHINES
    ],
)
def test_ram_of_other_targets_is_where_qemu_has_it(name: str, disk: Path) -> None:
    target = MACHINES[name]
    with GuestRam(target.length) as ram, OtherQemu(target, ram) as vm:
        with vm.connect() as qmp:
            text = qmp.execute("human-monitor-command", {"command-line": "info mtree -f"})
        vm.save(disk / "s")
    ram_is = [one for one in memory_seen(text) if one.block == target.block]
    assert named(look(disk / "s").ranges) == ram_is
    assert sum(one.length for one in ram_is) == target.length


def test_arm_guest_of_32_bits_has_a_lime_file_and_no_elf_core(disk: Path) -> None:
    target = replace(TARGETS["aarch64"], arguments=("-cpu", "cortex-a15"))
    with GuestRam(target.length) as ram, OtherQemu(target, ram) as vm:
        vm.save(disk / "s")
    with pytest.raises(NotSupported, match=r"32 bits.*LiME"):
        convert(disk / "s", disk / "elf", to="elf")
    convert(disk / "s", disk / "lime", to="lime")
