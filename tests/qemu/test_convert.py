"""Snapshots of a real QEMU in other forms, which it loads as it would the first."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyqmigrate.enums import Format
from pyqmigrate.export.convert import convert
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.devices import devices
from pyqmigrate.snapshot.save.writer import SaveReport
from tests.harness.compare_memory import assert_same_blocks
from tests.harness.contents import Contents, fill
from tests.harness.covering import covering
from tests.harness.machine import RAM_BLOCK, GuestRam, Mode, Qemu
from tests.harness.pattern_guest import build, check_pattern
from tests.harness.sequential_saves import SequentialQemu

pytestmark = pytest.mark.qemu

RAM = 32 << 20
FORMS = [Format.MAPPED_RAM, Format.SEQUENTIAL]
QEMU = {Format.MAPPED_RAM: Qemu, Format.SEQUENTIAL: SequentialQemu}


@dataclass(frozen=True)
class Saved:
    """A file of QEMU's and what its guest's memory was."""

    path: Path
    machine: str
    blocks: dict[str, bytes]
    image: Path | None = None


def save_paused(directory: Path, machine: str, form: Format) -> Saved:
    path = directory / f"theirs.{form}"
    with GuestRam(RAM) as ram, QEMU[form](ram, machine=machine) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED, seed=8)
        vm.save(path)
        return Saved(path, machine, vm.read_blocks())


def save_running(directory: Path, machine: str, form: Format, *, xbzrle: bool = False) -> Saved:
    path, serial, image = directory / f"live.{form}", directory / "serial", build(directory, RAM)
    with (
        GuestRam(RAM) as ram,
        QEMU[form](ram, machine=machine, run=True, bios=image, serial=serial) as vm,
    ):
        deadline = time.monotonic() + 60
        while len(serial.read_bytes()) < 2:
            assert time.monotonic() < deadline, "the guest does not run"
            time.sleep(0.01)
        if isinstance(vm, SequentialQemu):
            vm.xbzrle = xbzrle
            vm.save_in_rounds(path, 4)
        else:
            vm.save(path, Mode(channels=2, multifd=True))
        return Saved(path, machine, vm.read_blocks(), image)


def assert_loads(path: Path, saved: Saved, form: Format) -> None:
    with (
        GuestRam(RAM) as ram,
        QEMU[form](
            ram,
            machine=saved.machine,
            incoming=True,
            bios=saved.image,
            serial=path.with_name("serial-after") if saved.image else None,
        ) as vm,
    ):
        vm.load(path)
        assert_same_blocks(vm.read_blocks(), saved.blocks)


def assert_same_state(path: Path, other: Path) -> None:
    """The same device sections, byte for byte, and the same description of them."""
    pair = []
    for file in (path, other):
        with open_snapshot(file) as snapshot:
            pair.append(state_of(snapshot))
    assert pair[0] == pair[1]


def state_of(snapshot: Snapshot) -> tuple[object, ...]:
    stream, source = snapshot.stream, snapshot.source
    sections = [
        (s.kind.name, s.section_id, source.read_at(s.offset, s.length))
        for s in stream.sections
        if s.name != "ram"
    ]
    devices = {k: v for k, v in (stream.description or {}).items() if k != "configuration"}
    return (stream.machine, stream.target_page_bits, stream.uuid, sections, json.dumps(devices))


def description_of(path: Path) -> bytes:
    """The text, byte for byte."""
    with open_snapshot(path) as snapshot:
        start = snapshot.stream.description_offset
        assert start is not None
        return snapshot.source.read_at(start, snapshot.stream.end - start)


# Each machine and each form.
MATRIX = covering(
    ((machine, form) for machine in RAM_BLOCK for form in FORMS),
    short=[("pc", Format.MAPPED_RAM), ("q35", Format.SEQUENTIAL), ("microvm", Format.SEQUENTIAL)],
)


@pytest.mark.parametrize(("machine", "form"), MATRIX)
def test_other_form_and_back_are_loaded_with_equal_memory(
    machine: str, form: Format, disk: Path
) -> None:
    saved = save_paused(disk, machine, form)
    [other] = set(FORMS) - {form}
    convert(saved.path, disk / "there", to=other)
    convert(disk / "there", disk / "back", to=form)
    assert_loads(disk / "there", saved, other)
    assert_loads(disk / "back", saved, form)
    assert_same_state(saved.path, disk / "there")
    assert_same_state(saved.path, disk / "back")
    assert description_of(disk / "back") == description_of(saved.path), "as QEMU writes it"


@pytest.mark.parametrize(
    ("machine", "form"),
    covering(
        ((machine, form) for machine in RAM_BLOCK for form in FORMS),
        short=[("pc", Format.MAPPED_RAM), ("microvm", Format.SEQUENTIAL)],
    ),
)
def test_live_save_is_one_instant_in_the_other_form(machine: str, form: Format, disk: Path) -> None:
    saved = save_running(disk, machine, form)
    [other] = set(FORMS) - {form}
    convert(saved.path, disk / "there", to=other)
    with open_snapshot(disk / "there") as snapshot:
        block = snapshot.blocks[RAM_BLOCK[machine]]
        check_pattern(block.read(0, block.length))
    assert_loads(disk / "there", saved, other)
    assert_same_state(saved.path, disk / "there")


def test_changes_to_pages_are_applied(disk: Path) -> None:
    saved = save_running(disk, "pc", Format.SEQUENTIAL, xbzrle=True)
    convert(saved.path, disk / "there", to="mapped-ram")
    assert_loads(disk / "there", saved, Format.MAPPED_RAM)
    with open_snapshot(saved.path) as snapshot:
        for name, block in snapshot.blocks.items():
            assert block.read(0, block.length) == saved.blocks[name]


def test_raw_files_of_a_sequential_stream_hold_the_memory(disk: Path) -> None:
    saved = save_paused(disk, "pc", Format.SEQUENTIAL)
    convert(saved.path, disk / "raw", to="raw")
    assert (disk / "raw/pc.ram.raw").read_bytes() == saved.blocks["pc.ram"]


def test_zero_pages_are_holes_of_the_mapped_file(disk: Path) -> None:
    saved = save_paused(disk, "q35", Format.SEQUENTIAL)
    report = convert(saved.path, disk / "there", to="mapped-ram", sparse="exact")
    assert isinstance(report, SaveReport)
    data = sum(
        any(block[at : at + 4096])
        for block in saved.blocks.values()
        for at in range(0, len(block), 4096)
    )
    assert report.data_pages == data
    assert (disk / "there").stat().st_blocks * 512 < data * 4096 + (1 << 20)


def test_stale_bytes_under_clear_bits_do_not_come_along(disk: Path) -> None:
    saved = save_paused(disk, "pc", Format.MAPPED_RAM)
    with open_snapshot(saved.path) as snapshot:
        block = snapshot.blocks["pc.ram"]
        stale = [first for first, _, data in block.runs() if not data][:50]
        assert stale
        at = block.pages_offset
    fd = os.open(saved.path, os.O_WRONLY)
    for page in stale:
        os.pwrite(fd, b"\xee" * 4096, at + page * 4096)
    os.close(fd)
    convert(saved.path, disk / "there", to="stream")
    assert_loads(disk / "there", saved, Format.SEQUENTIAL)


def test_kind_is_found_by_looking(disk: Path) -> None:
    for form in FORMS:
        saved = save_paused(disk, "microvm", form)
        with open_snapshot(saved.path) as snapshot:
            assert snapshot.format is Format(form.value)
            assert snapshot.machine.startswith("microvm") or snapshot.machine
            snapshot.verify()
        assert devices(saved.path).devices


def test_offset_is_kept_apart(disk: Path) -> None:
    saved = save_paused(disk, "pc", Format.SEQUENTIAL)
    convert(saved.path, f"file:{disk}/there,offset=0x1234", to="mapped-ram")
    with GuestRam(RAM) as ram, Qemu(ram, incoming=True) as vm:
        vm.load(disk / "there", offset=0x1234)
        assert_same_blocks(vm.read_blocks(), saved.blocks)
    with open_snapshot(saved.path) as snapshot, open_snapshot(disk / "there", offset=0x1234) as o:
        assert snapshot.machine == o.machine


class SharingQemu(SequentialQemu):
    """It leaves memory out that is a shared file."""

    def _configure(self, mode: Mode, bandwidth: int = 0) -> None:
        super()._configure(mode, bandwidth)
        self.set_capabilities({"x-ignore-shared": True})


def shared_dimms(directory: Path, ram: GuestRam) -> list[str]:
    """A q35 whose memory, two modules that were plugged in included, is shared files."""
    words = ["-machine", "q35,memory-backend=m0", "-m", f"{RAM >> 20}M,slots=4,maxmem=1G"]
    files = {"m0": f"/proc/self/fd/{ram.fd}"}
    for name in ("d0", "d1"):
        files[name] = str(directory / name)
        with (directory / name).open("ab") as file:
            file.truncate(128 << 20)
        words += ["-device", f"pc-dimm,memdev={name}"]
    backends = [
        f"memory-backend-file,id={name},share=on,mem-path={path},"
        f"size={RAM if name == 'm0' else 128 << 20}"
        for name, path in files.items()
    ]
    return [*(word for one in backends for word in ("-object", one)), *words]


def test_blocks_whose_content_is_elsewhere_keep_their_addresses(disk: Path) -> None:
    with GuestRam(RAM) as ram:
        words = shared_dimms(disk, ram)
        with SharingQemu(ram, machine="q35", memory=words) as vm:
            fill(memoryview(ram.memory), Contents.SPECKLED, seed=8)
            vm.save(disk / "from")
        convert(disk / "from", disk / "to", to="stream")
        with open_snapshot(disk / "from") as one, open_snapshot(disk / "to") as other:
            addresses = {name: block.address for name, block in one.blocks.items()}
            assert addresses == {name: block.address for name, block in other.blocks.items()}
            assert addresses["d0"] != addresses["d1"]
        with SharingQemu(ram, machine="q35", memory=words, incoming=True) as vm:
            vm.load(disk / "to")
