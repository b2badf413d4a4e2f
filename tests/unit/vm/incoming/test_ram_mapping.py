"""Which blocks a QEMU maps from a snapshot, and the command line for that."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pyqmigrate
from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.vm.incoming.ram_mapping import Mapped, map_blocks
from pyqmigrate.vm.qemu.command_line import CommandLine

MIB = 1 << 20
FD = 77


@pytest.fixture
def snapshot(tmp_path: Path) -> Iterator[pyqmigrate.MappedRamSnapshot]:
    path = tmp_path / "guest.mapped"
    lengths = {"pc.ram": 4, "m0": 2, "m1": 2, "/objects/old": 1, "0000:00:02.0/vga.vram": 4}
    pyqmigrate.save(
        path,
        [
            pyqmigrate.RamBlock(name, np.zeros(length * MIB, dtype=np.uint8))
            for name, length in lengths.items()
        ],
    )
    with pyqmigrate.open_snapshot(path) as opened:
        yield opened


def mapped(snapshot: pyqmigrate.MappedRamSnapshot, text: str) -> Mapped:
    return map_blocks(CommandLine.parse(["qemu", *text.split()]), snapshot, FD)


def backends(found: Mapped) -> dict[str, dict[str, str]]:
    objects = [option.properties("qom-type") for option in found.command.all("object")]
    return {properties["id"]: properties for properties in objects}


def test_machine_of_m_alone_gets_a_backend_of_its_blocks_name(
    snapshot: pyqmigrate.MappedRamSnapshot,
) -> None:
    found = mapped(snapshot, "-M pc -m 4")
    assert found.blocks == ["pc.ram"]
    assert found.command.merged("machine", "type")["memory-backend"] == "pc.ram"
    assert backends(found)["pc.ram"] == {
        "qom-type": "memory-backend-file",
        "id": "pc.ram",
        "size": str(4 * MIB),
        "mem-path": f"/proc/self/fd/{FD}",
        "share": "off",
        "readonly": "on",
        "rom": "off",
        "align": str(2 * MIB),
        "offset": str(snapshot.blocks["pc.ram"].pages_offset),
        "prealloc": "off",
        "x-use-canonical-path-for-ramblock-id": "off",
    }


@pytest.mark.parametrize("name", ["pc\0.ram", "pc ram.ram", "0.ram", "\udc80.ram", "p,c.ram"])
def test_block_whose_name_no_backend_can_have_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile.mapped"
    pyqmigrate.save(
        path,
        [
            pyqmigrate.RamBlock(
                "x" * len(name.encode("utf-8", "surrogateescape")), np.zeros(MIB, dtype=np.uint8)
            )
        ],
    )
    data = path.read_bytes()
    raw = name.encode("utf-8", "surrogateescape")
    path.write_bytes(data.replace(b"x" * len(raw), raw, 1))
    with (
        pyqmigrate.open_snapshot(path) as snapshot,
        pytest.raises(NotSupported, match="cannot be named like"),
    ):
        mapped(snapshot, "-M pc")


def test_own_block_is_found_without_m(snapshot: pyqmigrate.MappedRamSnapshot) -> None:
    assert mapped(snapshot, "-M pc").blocks == ["pc.ram"]


def test_backends_of_the_command_line_are_replaced_in_place(
    snapshot: pyqmigrate.MappedRamSnapshot,
) -> None:
    found = mapped(
        snapshot,
        "-object memory-backend-ram,id=m0,size=2M -object memory-backend-memfd,id=m1,size=2M "
        "-numa node,memdev=m0 -numa node,memdev=m1",
    )
    assert found.blocks == ["m0", "m1"]
    assert {b["qom-type"] for b in backends(found).values()} == {"memory-backend-file"}
    assert [option.name for option in found.command.options] == ["object", "object", "numa", "numa"]


def test_backend_in_json_is_replaced(snapshot: pyqmigrate.MappedRamSnapshot) -> None:
    text = '{"qom-type":"memory-backend-ram","id":"m0","size":2097152,"policy":"bind"}'
    found = mapped(snapshot, f"-M pc,memory-backend=m0 -object {text}")
    assert backends(found)["m0"]["qom-type"] == "memory-backend-file"
    assert backends(found)["m0"]["policy"] == "bind"


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ('{"qom-type":"memory-backend-ram","id":"m0","size":2097152,"host-nodes":[0,2]}', [0, 2]),
        ("memory-backend-ram,id=m0,size=2M,host-nodes=0,host-nodes=2", [0, 2]),
        ("memory-backend-ram,id=m0,size=2M,host-nodes=1-3", [1, 2, 3]),
    ],
)
def test_nodes_of_the_host_stay_a_list(
    snapshot: pyqmigrate.MappedRamSnapshot, text: str, nodes: list[int]
) -> None:
    found = mapped(snapshot, f"-M pc,memory-backend=m0 -object {text}")
    (option,) = found.command.all("object")
    assert json.loads(option.value or "")["host-nodes"] == nodes


def test_node_of_the_host_that_is_not_a_number_is_refused(
    snapshot: pyqmigrate.MappedRamSnapshot,
) -> None:
    with pytest.raises(UsageError, match="host-nodes='x'"):
        mapped(
            snapshot,
            "-M pc,memory-backend=m0 -object memory-backend-ram,id=m0,size=2M,host-nodes=x",
        )


def test_range_of_nodes_is_no_longer_than_a_host_has(
    snapshot: pyqmigrate.MappedRamSnapshot,
) -> None:
    with pytest.raises(UsageError, match="host-nodes="):
        mapped(
            snapshot,
            "-M pc,memory-backend=m0 -object "
            "memory-backend-ram,id=m0,size=2M,host-nodes=0-99999999999",
        )


def test_block_with_a_whole_path_keeps_it(snapshot: pyqmigrate.MappedRamSnapshot) -> None:
    found = mapped(
        snapshot, "-M pc,memory-backend=old -object memory-backend-file,id=old,size=1M,mem-path=/x"
    )
    assert found.blocks == ["/objects/old"]
    assert backends(found)["old"]["x-use-canonical-path-for-ramblock-id"] == "on"


def test_what_cannot_hold_for_mapped_memory_is_overridden_and_noted(
    snapshot: pyqmigrate.MappedRamSnapshot,
) -> None:
    found = mapped(
        snapshot,
        "-M pc,memory-backend=m0 -mem-prealloc -device virtio-balloon-pci "
        "-object memory-backend-memfd,id=m0,size=2M,share=on,prealloc=on",
    )
    assert backends(found)["m0"]["share"] == "off"
    assert backends(found)["m0"]["prealloc"] == "off"
    assert not found.command.has("mem-prealloc")
    notes = " ".join(found.notes)
    assert all(w in notes for w in ("share=on", "prealloc=on", "-mem-prealloc", "balloon"))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("-overcommit mem-lock=on", "mem-lock=on"),
        ("-device vfio-pci,host=1:0.0", "pins"),
        ("-netdev vhost-vdpa,id=n,vhostdev=/dev/v", "pins"),
    ],
)
def test_what_makes_all_memory_be_read_is_noted(
    snapshot: pyqmigrate.MappedRamSnapshot, text: str, word: str
) -> None:
    assert word in " ".join(mapped(snapshot, f"-m 4 {text}").notes)
    assert not mapped(snapshot, "-m 4").notes


def test_mem_path_is_left_out(snapshot: pyqmigrate.MappedRamSnapshot) -> None:
    found = mapped(snapshot, "-m 4 -mem-path /dev/hugepages")
    assert not found.command.has("mem-path")
    assert "-mem-path" in found.notes[0]


@pytest.mark.parametrize("device", ["nvdimm", "virtio-mem-pci", "virtio-pmem-pci"])
def test_memory_that_is_a_device_of_its_own_is_left_alone(
    snapshot: pyqmigrate.MappedRamSnapshot, device: str
) -> None:
    found = mapped(
        snapshot, f"-m 4 -device {device},memdev=m1 -object memory-backend-ram,id=m1,size=2M"
    )
    assert found.blocks == ["pc.ram"]
    assert backends(found)["m1"]["qom-type"] == "memory-backend-ram"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("-m 8", "no RAM block of 8388608 bytes"),
        ("-m 4 -netdev vhost-user,id=n,chardev=c", "vhost-user"),
        ("-M pc,memory-backend=x -object memory-backend-ram,id=x,size=4M", "no memory backend"),
        ("-m 4 -readconfig /no/such/file", "cannot read -readconfig"),
    ],
)
def test_memory_that_cannot_be_mapped_is_refused_with_the_reason(
    snapshot: pyqmigrate.MappedRamSnapshot, text: str, reason: str
) -> None:
    with pytest.raises(NotSupported, match=reason):
        mapped(snapshot, text)


def test_configuration_file_with_memory_in_it_is_refused(
    snapshot: pyqmigrate.MappedRamSnapshot, tmp_path: Path
) -> None:
    (tmp_path / "vm.cfg").write_text('[object "m0"]\n qom-type = "memory-backend-ram"\n')
    with pytest.raises(NotSupported, match="describes memory"):
        mapped(snapshot, f"-m 4 -readconfig {tmp_path}/vm.cfg")


def test_configuration_file_without_memory_is_harmless(
    snapshot: pyqmigrate.MappedRamSnapshot, tmp_path: Path
) -> None:
    (tmp_path / "vm.cfg").write_text('[device]\n driver = "virtio-rng-pci"\n')
    assert mapped(snapshot, f"-m 4 -readconfig {tmp_path}/vm.cfg").blocks == ["pc.ram"]


def test_configuration_that_comes_through_a_pipe_is_left_to_qemu(
    snapshot: pyqmigrate.MappedRamSnapshot,
) -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"[device]\n")
        with pytest.raises(NotSupported, match="is not a regular file"):
            mapped(snapshot, f"-m 4 -readconfig /proc/self/fd/{reader}")
        assert os.read(reader, 100) == b"[device]\n"
    finally:
        os.close(reader)
        os.close(writer)
