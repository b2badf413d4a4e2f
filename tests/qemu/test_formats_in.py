"""Files of QEMUs and of libvirt in every form they have: opened by looking, and converted."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pyqmigrate import FileMemory, NotSupported, UsageError, convert, open_snapshot
from pyqmigrate.enums import Format
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from pyqmigrate.snapshot.provenance import provenance
from tests.harness.compare_memory import assert_same_blocks, assert_same_memory
from tests.harness.contents import Contents, fill
from tests.harness.libvirt import Libvirt
from tests.harness.libvirt import save as save_by_libvirt
from tests.harness.machine import RAM_BLOCK, GuestRam, Mode, Qemu
from tests.harness.migrating import migrate
from tests.harness.other_targets import TARGETS, OtherQemu, OtherTarget, memory_of
from tests.harness.pattern_guest import check_pattern
from tests.harness.sequential_saves import SequentialQemu

pytestmark = pytest.mark.qemu

RAM = 32 << 20
XML = "<domain type='qemu'><name>guest</name></domain>"


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> OtherTarget:
    return TARGETS[request.param]


@pytest.fixture
def ram(target: OtherTarget) -> Iterator[GuestRam]:
    rng = np.random.default_rng(5)
    with GuestRam(target.length) as ram:
        for start in rng.integers(0, target.length // 4096 - 16, 200):
            length = int(rng.integers(1, 16)) * 4096
            ram.memory[start * 4096 : start * 4096 + length] = rng.bytes(length)
        yield ram


def assert_loads(target: OtherTarget, path: Path, expected: bytes, *, mapped: bool) -> None:
    with (
        GuestRam(target.length) as ram,
        OtherQemu(target, ram, ["-incoming", "defer"]) as qemu,
        qemu.connect() as qmp,
    ):
        migrate(qmp, "migrate-incoming", f"file:{path}", mapped=mapped)
        assert_same_memory(memory_of(qmp, qemu.process.pid, target.block), expected)


def test_sequential_stream_of_another_target_is_read_and_converted(
    target: OtherTarget, ram: GuestRam, disk: Path
) -> None:
    with OtherQemu(target, ram) as qemu, qemu.connect() as qmp:
        migrate(qmp, "migrate", f"file:{disk}/stream", mapped=False)
        expected = bytes(ram.memory)
    with open_snapshot(disk / "stream") as snapshot:
        snapshot.verify()
        assert snapshot.format is Format.SEQUENTIAL
        assert target.machine in snapshot.machine
        assert_same_memory(snapshot.blocks[target.block].read(0, target.length), expected)
    convert(disk / "stream", disk / "mapped", to="mapped-ram")
    convert(disk / "mapped", disk / "back", to="stream")
    assert_loads(target, disk / "mapped", expected, mapped=True)
    assert_loads(target, disk / "back", expected, mapped=False)


def test_mapped_file_of_another_target_is_converted(
    target: OtherTarget, ram: GuestRam, disk: Path
) -> None:
    with OtherQemu(target, ram) as qemu:
        qemu.save(disk / "mapped")
        expected = bytes(ram.memory)
    convert(disk / "mapped", disk / "stream", to="stream")
    assert_loads(target, disk / "stream", expected, mapped=False)


@pytest.mark.parametrize("machine", RAM_BLOCK)
def test_stream_out_of_a_pipe_is_read(machine: str, disk: Path) -> None:
    with GuestRam(RAM) as ram, SequentialQemu(ram, machine=machine) as vm:
        fill(memoryview(ram.memory), Contents.RUNS, seed=2)
        vm.set_capabilities({"events": True, "mapped-ram": False})
        vm.execute("migrate", {"uri": f"exec:cat > {disk}/stream"})
        assert vm.wait()["status"] == "completed"
        blocks = vm.read_blocks()
    with open_snapshot(disk / "stream") as snapshot:
        snapshot.verify()
        read = {name: block.read(0, block.length) for name, block in snapshot.blocks.items()}
    assert_same_blocks(read, blocks)


def test_raw_image_of_libvirt_is_read_and_converted(disk: Path) -> None:
    path = disk / "image"
    with GuestRam(RAM) as ram, SequentialQemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED, seed=3)
        vm.save(disk / "stream")
        blocks = vm.read_blocks()
    header = LibvirtHeader(True, 2, ImageFormat.RAW, False, XML, "", 70001, "little")
    path.write_bytes(encode_header(header) + (disk / "stream").read_bytes())
    with open_snapshot(path) as snapshot:
        assert snapshot.libvirt == header
        assert provenance(snapshot).libvirt
        snapshot.verify()
    convert(path, disk / "mapped", to="mapped-ram")
    with GuestRam(RAM) as ram, Qemu(ram, incoming=True) as vm:
        vm.load(disk / "mapped")
        assert_same_blocks(vm.read_blocks(), blocks)


def test_sparse_image_of_libvirt_is_read_and_converted(disk: Path) -> None:
    path = disk / "image"
    header = LibvirtHeader(True, 2, ImageFormat.SPARSE, False, XML, "<c/>", 70001, "little")
    path.write_bytes(encode_header(header))
    with GuestRam(RAM) as ram, Qemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED, seed=3)
        vm.save(path, Mode(channels=2, multifd=True, direct_io=True), offset=70001)
        blocks = vm.read_blocks()
    with open_snapshot(path) as snapshot:
        assert (snapshot.format, snapshot.libvirt) == (Format.MAPPED_RAM, header)
        snapshot.verify()
    convert(path, disk / "mapped", to="mapped-ram")
    with GuestRam(RAM) as ram, Qemu(ram, incoming=True) as vm:
        vm.load(disk / "mapped")
        assert_same_blocks(vm.read_blocks(), blocks)


@pytest.mark.parametrize("form", [pytest.param("raw", marks=pytest.mark.long), "sparse"])
def test_image_that_libvirt_itself_wrote_is_read_and_converted(form: str, disk: Path) -> None:
    # Socket paths are short, so this is not pytest's directory.
    with tempfile.TemporaryDirectory(prefix="lv-") as name, Libvirt(Path(name)) as libvirt:
        image = save_by_libvirt(libvirt, disk, "pc", "--image-format", form)
    to = "mapped-ram" if form == "raw" else "stream"
    convert(image.path, disk / "converted", to=to)
    read = []
    for path in (image.path, disk / "converted"):
        with open_snapshot(path) as snapshot:
            snapshot.verify()
            read.append({n: b.read(0, b.length) for n, b in snapshot.blocks.items()})
    assert_same_blocks(read[1], read[0])
    check_pattern(read[0]["pc.ram"])
    with open_snapshot(image.path) as snapshot:
        assert snapshot.libvirt == image.header


def save_without_shared(disk: Path) -> tuple[dict[str, bytes], bytes]:
    """A sequential stream that leaves out guest memory, which is a file."""
    with GuestRam(RAM) as ram, SequentialQemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED, seed=3)
        vm.set_capabilities({"events": True, "mapped-ram": False, "x-ignore-shared": True})
        vm.execute("migrate", {"uri": f"file:{disk}/stream"})
        assert vm.wait()["status"] == "completed"
        return vm.read_blocks(), bytes(ram.memory)


def test_block_that_is_kept_elsewhere_is_external(disk: Path) -> None:
    blocks, _ = save_without_shared(disk)
    with open_snapshot(disk / "stream") as snapshot:
        assert [b.name for b in snapshot.blocks.values() if b.external] == ["pc.ram"]
        with pytest.raises(UsageError, match="not in this file"):
            snapshot.blocks["pc.ram"].read(0, 1)
        bios = snapshot.blocks["pc.bios"]
        assert bios.read(0, bios.length) == blocks["pc.bios"]
    with pytest.raises(NotSupported, match="block 'pc"):
        convert(disk / "stream", disk / "mapped", to="mapped-ram")


def test_memory_that_was_kept_elsewhere_is_put_in(disk: Path) -> None:
    blocks, memory = save_without_shared(disk)
    (disk / "ram").write_bytes(memory)
    with (disk / "ram").open("rb") as file:
        convert(
            disk / "stream",
            disk / "mapped",
            to="mapped-ram",
            memories={"pc.ram": FileMemory(file.fileno())},
        )
    with GuestRam(RAM) as ram, Qemu(ram, incoming=True) as vm:
        vm.load(disk / "mapped")
        assert_same_blocks(vm.read_blocks(), blocks)


def test_stream_that_leaves_a_block_out_goes_on_doing_so(disk: Path) -> None:
    blocks, memory = save_without_shared(disk)
    convert(disk / "stream", disk / "again", to="stream")
    with GuestRam(RAM) as ram, SequentialQemu(ram, incoming=True) as vm:
        ram.memory[:] = memory
        vm.set_capabilities({"x-ignore-shared": True})
        vm.load(disk / "again")
        assert_same_blocks(vm.read_blocks(), blocks)


def test_qemu_of_a_file_is_reported(disk: Path) -> None:
    with GuestRam(RAM) as ram, Qemu(ram) as vm:
        version = vm.execute("query-version")["qemu"]
        vm.save(disk / "mapped")
    with open_snapshot(disk / "mapped") as snapshot:
        origin = provenance(snapshot)
    assert origin.qemu == (version["major"], version["minor"])
    assert (origin.loadable, origin.obstacles) == (True, ())
    assert origin.run_state in ("prelaunch", "paused", "running")
