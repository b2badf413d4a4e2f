"""QEMU's analyze-migration.py reads every kind of file that is written here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyqmigrate import RamBlock, open_snapshot
from pyqmigrate import save as save_blocks
from pyqmigrate.export.convert import convert
from pyqmigrate.io.memory import FileMemory
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from tests.harness.analyzer import analyze, analyzers
from tests.harness.described_reader import DescribedReader
from tests.harness.machine import GuestRam
from tests.harness.other_targets import TARGETS, OtherQemu
from tests.harness.saving import source
from tests.harness.sequential_saves import SequentialQemu

pytestmark = pytest.mark.qemu

RAM = 16 << 20


@pytest.fixture(scope="module")
def files(module_disk: Path) -> dict[str, Path]:
    """A file of every kind, by the way it was made; each is of a guest with device state."""
    disk = module_disk
    made: dict[str, Path] = {}
    for memory in ("file", "private"):
        where = disk / memory
        where.mkdir()
        with source(where, memory=memory) as guest:
            guest.save(disk / f"direct-{memory}")
            made[f"direct-{memory}"] = disk / f"direct-{memory}"
            if memory == "private":
                guest.save(disk / "undescribed", describe=False)
                made["direct-undescribed"] = disk / "undescribed"
                # A guest that validates its uuid has it in the configuration.
                guest.vm.set_capabilities({"validate-uuid": True})
                guest.save(disk / "uuid")
                made["direct-uuid"] = disk / "uuid"
                guest.save(disk / "qemu", engine="qemu")
                made["qemu-uuid"] = disk / "qemu"
    with GuestRam(RAM) as ram, SequentialQemu(ram) as vm:
        vm.save(disk / "sequential")
        made["sequential"] = disk / "sequential"
    arm = TARGETS["aarch64"]
    with GuestRam(arm.length) as ram, OtherQemu(arm, ram) as other:
        other.save(disk / "arm")
        made["arm"] = disk / "arm"
    return made


def variants(files: dict[str, Path], disk: Path) -> Iterator[tuple[str, Path, bool]]:
    """What was made, and all that is made of it: name, file, and whether it is mapped-ram."""
    for name, path in files.items():
        mapped = name != "sequential"
        yield name, path, mapped
        target = disk / f"{name}-converted"
        convert(path, target, to="stream" if mapped else "mapped-ram")
        yield f"{name}, converted", target, not mapped
        back = disk / f"{name}-back"
        convert(target, back, to="mapped-ram" if mapped else "stream")
        yield f"{name}, there and back", back, mapped


def read_by_all(name: str, path: Path, mapped: bool) -> list[dict[str, Any]]:
    return [analyze(script, path) for script in analyzers(mapped_ram=mapped)]


def assert_configuration_described(path: Path) -> None:
    """What the file says of its configuration is where, and what, its description says."""
    with open_snapshot(path) as snapshot:
        stream = snapshot.stream
        described = (stream.description or {})["configuration"]
        reader = DescribedReader(snapshot.source.read_at(9, 4096))
        found = reader.state(described)
    names = found.get("configuration/capabilities", {}).get("capabilities", [])
    assert tuple(names) == stream.capabilities
    assert found["name"] == [stream.machine.encode()]
    assert reader.data[reader.at] == 0x01, "RAM's section comes next"
    assert ("configuration/uuid" in found) == (stream.uuid is not None)
    assert ("configuration/target-page-bits" in found) == (stream.target_page_bits is not None)


def test_every_kind_of_file_is_read(files: dict[str, Path], disk: Path) -> None:
    kinds = 0
    for name, path, mapped in variants(files, disk):
        assert_configuration_described(path)
        for found in read_by_all(name, path, mapped):
            kinds += 1
            sections = {key.rpartition(" (")[0] for key in found}
            assert {"ram", "cpu", "globalstate"} <= sections, name
            if "undescribed" not in name and "arm" not in name:
                [cpu] = [value for key, value in found.items() if key.startswith("cpu (")]
                assert cpu["env.eip"].startswith("0x"), name
    assert kinds >= 12


def test_file_without_the_shared_memory_is_read(disk: Path) -> None:
    """x-ignore-shared, as QEMU writes it, converted with and without the memory."""
    with GuestRam(RAM) as ram, SequentialQemu(ram) as vm:
        vm.set_capabilities({"x-ignore-shared": True})
        vm.save(disk / "shared")
        block = vm.ram_block
        with open_snapshot(disk / "shared") as snapshot:
            convert(snapshot, disk / "again", to="stream")
            memories = {block: FileMemory(ram.fd)}
            convert(snapshot, disk / "whole", to="mapped-ram", memories=memories)
            convert(snapshot, disk / "stream", to="stream", memories=memories)
    for name, mapped in (("shared", False), ("again", False), ("stream", False), ("whole", True)):
        assert_configuration_described(disk / name)
        for found in read_by_all(name, disk / name, mapped):
            assert any(key.startswith("cpu (") for key in found), name


def test_files_of_memory_alone_are_read(disk: Path) -> None:
    memory = np.ones(1 << 20, dtype=np.uint8)
    for bits, page_size, machine in ((None, 4096, ""), (12, 4096, "virt-10.0"), (10, 1024, "x")):
        blocks = [RamBlock("ram", memory, page_size)]
        save_blocks(disk / "mapped", blocks, machine=machine, target_page_bits=bits)
        start_sequential_save(
            disk / "stream", blocks, machine=machine, target_page_bits=bits
        ).wait()
        for name, mapped in (("mapped", True), ("stream", False)):
            assert_configuration_described(disk / name)
            for found in read_by_all(name, disk / name, mapped):
                assert [key.split()[0] for key in found] == ["ram"]
                assert [*next(iter(found.values()))["section sizes"]] == ["ram"]
