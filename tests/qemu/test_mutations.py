"""Files of a real QEMU, damaged: refused with one of our errors, or loaded; nothing else."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from tests.harness import stream_mutations as mutations
from tests.harness.contents import Contents, fill
from tests.harness.covering import covering
from tests.harness.machine import GuestRam, Mode, Qemu
from tests.harness.other_targets import TARGETS, OtherQemu
from tests.harness.pattern_guest import build
from tests.harness.sequential_saves import SequentialQemu

pytestmark = pytest.mark.qemu

RAM = 8 << 20
XML = "<domain type='qemu'><name>guest</name></domain>"


@dataclass(frozen=True)
class Base:
    """What is damaged."""

    path: Path
    offset: int = 0


def paused(path: Path) -> Base:
    with GuestRam(RAM) as ram, Qemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED)
        vm.save(path)
    return Base(path)


def at_an_offset(path: Path) -> Base:
    path.write_bytes(b"X" * 0x1234)
    with GuestRam(RAM) as ram, Qemu(ram, machine="q35") as vm:
        fill(memoryview(ram.memory), Contents.RUNS)
        vm.save(path, Mode(channels=2, multifd=True, direct_io=True), offset=0x1234)
    return Base(path, 0x1234)


def running(path: Path) -> Base:
    image = build(path.parent, RAM)
    with GuestRam(RAM) as ram, Qemu(ram, machine="microvm", run=True, bios=image) as vm:
        vm.save(path, Mode(channels=2, multifd=True))
    return Base(path)


def sequential(path: Path) -> Base:
    with GuestRam(RAM) as ram, SequentialQemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED)
        vm.save(path)
    return Base(path)


def sequential_with_changes(path: Path) -> Base:
    length = 2 * RAM  # less is saved before it can be made to change
    image, serial = build(path.parent, length), path.with_name("serial")
    with GuestRam(length) as ram, SequentialQemu(ram, run=True, bios=image, serial=serial) as vm:
        while not (serial.exists() and serial.stat().st_size >= 2):
            time.sleep(0.01)
        vm.xbzrle = True
        vm.save_in_rounds(path, 3)
    return Base(path)


def behind_libvirts_header(path: Path) -> Base:
    header = LibvirtHeader(True, 2, ImageFormat.SPARSE, False, XML, "<c/>", 70001, "little")
    path.write_bytes(encode_header(header))
    with GuestRam(RAM) as ram, Qemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED)
        vm.save(path, Mode(channels=2, multifd=True), offset=70001)
    return Base(path)


def sequential_behind_libvirts_header(path: Path) -> Base:
    stream = sequential(path).path.read_bytes()
    header = LibvirtHeader(True, 2, ImageFormat.RAW, True, XML, "", 4096, "little")
    path.write_bytes(encode_header(header) + stream)
    return Base(path)


def without_shared_memory(path: Path) -> Base:
    """Sequential: QEMU itself fails to write a mapped-ram file so."""
    with GuestRam(RAM) as ram, SequentialQemu(ram) as vm:
        vm.set_capabilities({"events": True, "mapped-ram": False, "x-ignore-shared": True})
        vm.execute("migrate", {"uri": f"file:{path}"})
        assert vm.wait()["status"] == "completed"
    return Base(path)


def with_dirty_bitmaps(path: Path) -> Base:
    disk = ["-blockdev", "driver=null-co,node-name=disk,size=67108864"]
    with GuestRam(RAM) as ram, Qemu(ram, extra=disk) as vm:
        for name in ("first", "second"):
            vm.execute("block-dirty-bitmap-add", {"node": "disk", "name": name})
        vm.set_capabilities({"dirty-bitmaps": True})
        vm.save(path)
    return Base(path)


def of_aarch64(path: Path) -> Base:
    """Sequential: its flash is 128 MiB, which a mapped-ram file has in full."""
    target = replace(TARGETS["aarch64"], length=RAM)
    with GuestRam(RAM) as ram, OtherQemu(target, ram) as vm, vm.connect() as qmp:
        fill(memoryview(ram.memory), Contents.SPECKLED)
        qmp.execute("migrate", {"uri": f"file:{path}"})
        while (state := qmp.execute("query-migrate"))["status"] != "completed":
            assert state["status"] in ("setup", "active", "device"), state
            time.sleep(0.01)
    return Base(path)


BASES = [
    paused,
    at_an_offset,
    running,
    sequential,
    sequential_with_changes,
    behind_libvirts_header,
    sequential_behind_libvirts_header,
    without_shared_memory,
    with_dirty_bitmaps,
    of_aarch64,
]


# One of each form and of each peculiarity; dirty bitmaps, which take the longest, are long.
SHORT = [
    at_an_offset,
    running,
    sequential_with_changes,
    behind_libvirts_header,
    without_shared_memory,
    of_aarch64,
]


@pytest.fixture(scope="module", params=covering(BASES, SHORT), ids=lambda f: f.__name__)
def base(request: pytest.FixtureRequest, module_disk: Path) -> Iterator[Base]:
    make: Callable[[Path], Base] = request.param
    path = module_disk / f"{make.__name__}.mapped"
    yield make(path)
    path.unlink()


def assert_nothing_worse_than_a_refusal(base: Base, first: int, count: int) -> None:
    outcomes = mutations.run(base.path, first, count, base.offset)
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    findings = [o for o in outcomes if o.verdict not in ("accepted", "refused")]
    worst = "\n".join(f"seed {o.seed}: {o.mutation}: {o.verdict} {o.detail}" for o in findings[:3])
    if findings:
        pytest.fail(f"{len(findings)} of {count}, the first:\n{worst}", pytrace=False)
    assert len(outcomes) == count
    assert verdicts["refused"] > count // 4, "the damage is too mild to prove anything"
    assert verdicts["accepted"] > 0, "the damage is too coarse to reach beyond the header"


def test_damaged_file_of_qemu_is_refused_or_loads(base: Base) -> None:
    assert_nothing_worse_than_a_refusal(base, first=0, count=12)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_thousands_of_damaged_files_of_qemu_are_refused_or_load(base: Base) -> None:
    assert_nothing_worse_than_a_refusal(base, first=1000, count=1700)
