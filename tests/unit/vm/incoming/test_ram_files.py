"""Which memory files a QEMU may load into, and which options prevent that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pyqmigrate
from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.vm.incoming.ram_files import RamFiles, loadable
from pyqmigrate.vm.qemu.command_line import CommandLine

MIB = 1 << 20


@pytest.fixture
def snapshot(tmp_path: Path) -> Iterator[pyqmigrate.MappedRamSnapshot]:
    path = tmp_path / "guest.mapped"
    pyqmigrate.save(path, [pyqmigrate.RamBlock("m0", np.zeros(2 * MIB, dtype=np.uint8))])
    with pyqmigrate.open_snapshot(path) as opened:
        yield opened


def parse(text: str) -> CommandLine:
    return CommandLine.parse(["qemu", *text.split()])


def on_file(path: Path, more: str = "") -> CommandLine:
    return parse(f"-object memory-backend-file,id=m0,size=2M,share=on,mem-path={path}{more}")


def test_file_is_emptied_only_where_the_block_is(
    snapshot: pyqmigrate.MappedRamSnapshot, shm: Path
) -> None:
    ram = shm / "ram"
    ram.write_bytes(b"\xee" * 4 * MIB)
    with RamFiles(on_file(ram, ",offset=1M"), snapshot) as files:
        assert ram.read_bytes() == b"\xee" * 4 * MIB
        files.clear()
    assert ram.read_bytes() == b"\xee" * MIB + bytes(2 * MIB) + b"\xee" * MIB


def test_file_that_is_open_elsewhere_is_refused(
    snapshot: pyqmigrate.MappedRamSnapshot, shm: Path
) -> None:
    (shm / "ram").write_bytes(b"\xee" * MIB)
    with (shm / "ram").open("rb"), pytest.raises(UsageError, match="has it open"):
        RamFiles(on_file(shm / "ram"), snapshot)


def test_file_that_is_open_elsewhere_and_holds_nothing_is_taken(
    snapshot: pyqmigrate.MappedRamSnapshot, shm: Path
) -> None:
    with (shm / "ram").open("wb") as file:
        os.truncate(file.fileno(), 2 * MIB)
        with RamFiles(on_file(shm / "ram"), snapshot) as files:
            assert not files.notes


@pytest.mark.usefixtures("same_descriptors")
def test_file_of_a_block_that_is_mapped_is_left_alone(
    snapshot: pyqmigrate.MappedRamSnapshot, shm: Path
) -> None:
    (shm / "ram").write_bytes(b"\xee" * MIB)
    with (shm / "ram").open("rb"), RamFiles(on_file(shm / "ram"), snapshot, ["m0"]) as files:
        files.clear()
    assert (shm / "ram").read_bytes() == b"\xee" * MIB


def test_memory_that_guests_share_is_theirs(
    snapshot: pyqmigrate.MappedRamSnapshot, shm: Path
) -> None:
    (shm / "ram").write_bytes(b"\xee" * MIB)
    command = CommandLine.parse(
        [*on_file(shm / "ram").argv(), "-device", "ivshmem-plain,memdev=m0"]
    )
    with (shm / "ram").open("rb"), RamFiles(command, snapshot) as files:
        assert not files.notes


def test_device_that_is_memory_cannot_be_looked_into(
    snapshot: pyqmigrate.MappedRamSnapshot,
) -> None:
    with pytest.raises(NotSupported, match="is not a regular file"):
        RamFiles(on_file(Path("/dev/null")), snapshot)


def test_memory_file_of_a_configuration_file_is_refused(
    snapshot: pyqmigrate.MappedRamSnapshot, tmp_path: Path
) -> None:
    (tmp_path / "vm.cfg").write_text('[object "m0"]\n mem-path = "/dev/shm/ram"\n')
    with pytest.raises(NotSupported, match="names a memory file"):
        RamFiles(parse(f"-readconfig {tmp_path}/vm.cfg"), snapshot)


@pytest.mark.parametrize(
    "text",
    [
        "memory-backend-ram,id=m0,size=2M,prealloc=on",
        '{"qom-type":"memory-backend-ram","id":"m0","size":2097152,"prealloc":true}',
    ],
)
def test_memory_is_not_written_before_it_is_loaded(
    snapshot: pyqmigrate.MappedRamSnapshot, text: str
) -> None:
    command, notes = loadable(parse(f"-object {text}"), snapshot)
    (option,) = command.all("object")
    assert option.properties("qom-type")["prealloc"] == "off"
    assert len(notes) == 1
