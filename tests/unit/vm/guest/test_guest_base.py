"""The snapshot that a guest was restored from: found by its mapping, and never taken on trust."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pyqmigrate
from pyqmigrate import NotSupported, RamBlock, SnapshotError, UsageError
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.snapshot.save.reflink import ReflinkWriter
from pyqmigrate.vm.guest.guest_base import GuestBase
from pyqmigrate.vm.guest.inspect import GuestBlock, GuestInfo
from tests.harness.guest_info import guest
from tests.harness.processes import PAGE, Holder

NPAGES = 64
MACHINE = "pc-q35-10.0"


@dataclass
class Restored:
    """A process that maps a snapshot privately, as a QEMU does, and has changed some pages."""

    path: Path
    info: GuestInfo


@pytest.fixture
def restored(tmp_path: Path) -> Iterator[Restored]:
    path = tmp_path / "base.mapped"
    memory = np.full(NPAGES * PAGE, 7, dtype=np.uint8)
    pyqmigrate.save(
        path, [RamBlock("pc.ram", memory), RamBlock("vga", bytes(4 * PAGE))], machine=MACHINE
    )
    with MappedRamSnapshot(StreamFile.open(path)) as snapshot:
        first = snapshot.blocks["pc.ram"].pages_offset // PAGE
    size = path.stat().st_size // PAGE
    with Holder(size, [first + 3, first + 9], flags=mmap.MAP_PRIVATE, path=path) as holder:
        address = holder.address + first * PAGE
        blocks = [
            GuestBlock("pc.ram", NPAGES * PAGE, PAGE, address, holder.memory, False, False),
            GuestBlock("vga", 4 * PAGE, PAGE, 0, holder.memory, False, False),
        ]
        process: Any = SimpleNamespace(pid=holder.pid, close=lambda: None)
        yield Restored(path, guest(*blocks, process=process))


@pytest.mark.parametrize("named", ["auto", "path", "none"])
def test_base_is_found_with_what_changed_since(restored: Restored, named: str) -> None:
    base = {"auto": "auto", "path": str(restored.path), "none": None}[named]
    with GuestBase.find(restored.info, base) as found:
        assert found.path == (None if named == "none" else restored.path)
        assert found.ram is not None
        assert [*found.ram.find_changed()["pc.ram"].runs()] == [(3, 1), (9, 1)]
        assert [block.name for block in found.whole] == ["vga"]
        found.check_unchanged()


def test_deleted_base_has_no_name_but_pages(restored: Restored) -> None:
    restored.path.unlink()
    with pytest.raises(SnapshotError, match="deleted, moved or replaced"):
        GuestBase.find(restored.info, "auto")
    with GuestBase.find(restored.info, None) as found:
        assert found.snapshot.blocks["pc.ram"].read(0, 1) == b"\7"


def test_replaced_base_is_not_taken(restored: Restored) -> None:
    copy = restored.path.with_name("copy")
    copy.write_bytes(restored.path.read_bytes())
    with pytest.raises(UsageError, match="another file"):
        GuestBase.find(restored.info, str(copy))
    copy.replace(restored.path)
    with pytest.raises(SnapshotError, match="deleted, moved or replaced"):
        GuestBase.find(restored.info, "auto")


@pytest.mark.parametrize("how", ["replaced", "removed", "touched"])
def test_change_of_the_base_is_noticed_when_it_is_closed(restored: Restored, how: str) -> None:
    with GuestBase.find(restored.info, "auto") as found:
        mark = found.mark
    mark.check()
    if how == "replaced":
        copy = restored.path.with_name("copy")
        copy.write_bytes(restored.path.read_bytes())
        copy.replace(restored.path)
    elif how == "removed":
        restored.path.unlink()
    else:
        os.utime(restored.path)
    with pytest.raises(SnapshotError, match="during the save"):
        mark.check()


def test_base_of_another_machine_is_refused(restored: Restored) -> None:
    blocks = restored.info.blocks
    other: Any = restored.info.process
    longer = GuestBlock("vga", 8 * PAGE, PAGE, 0, blocks[1].memory, False, False)
    with pytest.raises(SnapshotError, match=r"'vga' has 32768 bytes in the guest and 16384"):
        GuestBase.find(guest(blocks[0], longer, process=other), "auto")
    with pytest.raises(SnapshotError, match="is of machine"):
        GuestBase.find(guest(*blocks, process=other, machine="pc-i440fx-10.0"), "auto")


def test_block_that_cannot_be_read_is_refused_before_the_guest_is_stopped(
    restored: Restored,
) -> None:
    ram, video = restored.info.blocks
    unreadable = replace(video, memory=None, why_not="ptrace_scope forbids it")
    info = guest(ram, unreadable, process=restored.info.process)
    with pytest.raises(NotSupported, match=r"'vga' cannot be read: ptrace_scope forbids it"):
        GuestBase.find(info, "auto")


def test_guest_without_a_process_or_a_mapping_has_no_base(restored: Restored) -> None:
    with pytest.raises(NotSupported, match="process of this QEMU is unknown"):
        GuestBase.find(guest(), "auto")
    with Holder(NPAGES, [1], flags=mmap.MAP_PRIVATE) as holder:
        process: Any = SimpleNamespace(pid=holder.pid, close=lambda: None)
        block = GuestBlock(
            "pc.ram", NPAGES * PAGE, PAGE, holder.address, holder.memory, False, False
        )
        with pytest.raises(NotSupported, match="not restored with mode instant"):
            GuestBase.find(guest(block, process=process), "auto")


def test_clone_is_refused_without_reflinks(restored: Restored, shm: Path) -> None:
    output = OutputFile.open(shm / "clone", DirectIO.OFF)
    try:
        with (
            MappedRamSnapshot(StreamFile.open(restored.path)) as base,
            pytest.raises(NotSupported, match="XFS and btrfs have reflinks"),
        ):
            ReflinkWriter(output, base).begin()
    finally:
        output.abort()
    assert not list(shm.iterdir())
