"""What is told of a file's origin, and of whether QEMU would load it."""

from __future__ import annotations

import struct
from pathlib import Path

from pyqmigrate import open_snapshot
from pyqmigrate.snapshot.provenance import Provenance, provenance
from tests.harness.stream_builders import (
    EOF,
    RAM_EOS,
    Raw,
    command,
    end,
    page_records,
    sequential_stream,
)
from tests.harness.stream_builders import start as section_start


def judged(path: Path, data: bytes) -> Provenance:
    path.write_bytes(data)
    with open_snapshot(path) as snapshot:
        return provenance(snapshot)


def whole(raw: Raw) -> bytes:
    file = raw.file()
    return file.read_at(0, file.size)


def test_oldest_qemu_is_that_of_the_newest_feature(tmp_path: Path) -> None:
    assert judged(tmp_path / "s", sequential_stream(page_records())).qemu is None
    assert judged(tmp_path / "s", whole(Raw())).qemu == (9, 0)
    assert judged(tmp_path / "s", whole(Raw(machine=b"pc-q35-8.2"))).qemu == (9, 0)
    assert judged(tmp_path / "s", whole(Raw(machine=b"virt-10.1"))).qemu == (10, 1)
    assert judged(tmp_path / "s", whole(Raw(inside=command(11)))).qemu == (10, 0)


def test_blocks_of_mapped_ram_kept_elsewhere_need_qemu_11(tmp_path: Path) -> None:
    both = ("x-ignore-shared", "mapped-ram")
    raw = Raw(capabilities=both, gpa=bytes(8), bitmap_offset=0, pages_offset=0)
    origin = judged(tmp_path / "s", whole(raw))
    assert (origin.qemu, origin.loadable) == ((11, 0), True)
    assert any("before 11.0 cannot load" in remark for remark in origin.remarks)


def test_stream_of_a_machine_without_ram_is_loadable(tmp_path: Path) -> None:
    empty = section_start(1, "ram", 4, struct.pack(">Q", 4) + RAM_EOS) + end(1, RAM_EOS) + EOF
    origin = judged(tmp_path / "s", b"QEVM" + struct.pack(">IBI", 3, 7, 4) + b"none" + empty)
    assert origin.loadable
    assert any("no RAM" in remark for remark in origin.remarks)


def test_bits_past_the_end_of_a_block_are_an_obstacle(tmp_path: Path) -> None:
    data = bytearray(whole(Raw()))
    at = data.index(b"pc.ram") + 6 + 8 + 28
    data[at + 7] = 0x80
    origin = judged(tmp_path / "s", bytes(data))
    assert not origin.loadable
    assert "pc.ram" in origin.obstacles[0]
