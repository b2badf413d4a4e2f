"""Device state as QEMU writes it, both ways, read and put into a snapshot; no QEMU is needed."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import (
    Descriptors,
    NotSupported,
    SnapshotError,
    TargetError,
    UsageError,
    open_snapshot,
)
from pyqmigrate.format.device.sections import global_state
from pyqmigrate.format.stream.configuration import Configuration
from pyqmigrate.format.stream.description import with_configuration
from pyqmigrate.format.stream.writer import RAM_SECTION_ID
from pyqmigrate.vm.guest.device_state import DeviceState, read_devices, read_migrated
from tests.harness.direct import write_snapshot
from tests.harness.examples import some
from tests.harness.page_records import CONTINUE, PAGE, ZERO, word
from tests.harness.snapshots import load
from tests.harness.stream_builders import (
    EOF,
    blocks,
    capabilities,
    command,
    configured,
    described,
    described_as,
    device,
    end,
    full,
    part,
    start,
    str8,
    words,
)

pytestmark = pytest.mark.usefixtures("same_descriptors")

RAM, ROM = 64 * 4096, 2 * 4096
BLOCKS = {"pc.ram": RAM, "pc.rom": ROM, "empty": 4096}
MARK = words(0x10)
TIMER = full(7, "timer", b"\x01\x02\x03\x04\x05")
STATE = full(8, "globalstate", global_state("running").data)
SECTIONS = TIMER + STATE
DESCRIPTION = described(device("timer", 5), device("globalstate", 104))
SWITCHOVER = command(11)
ROM_PAGE = bytes(range(256)) * 16
IGNORES = capabilities("x-ignore-shared")


def entry(name: str, length: int) -> bytes:
    return str8(name) + words(length, 0)


def listed(names: Mapping[str, int]) -> bytes:
    return blocks(*(entry(*item) for item in names.items()), total=sum(names.values()))


HEAD = configured(IGNORES, machine=b"pc-q35-10.0") + listed(BLOCKS)
RECORDS = (
    word(4096, PAGE)
    + str8(b"pc.rom")
    + ROM_PAGE
    + word(0, ZERO | CONTINUE)
    + b"\0"
    + word(0, ZERO)
    + str8(b"empty")
    + b"\0"
)
PAGES = part(1, RECORDS + MARK)


def migrated(
    path: Path,
    *,
    head: bytes = HEAD,
    pages: bytes = PAGES,
    before: bytes = SWITCHOVER,
    sections: bytes = SECTIONS,
    description: bytes | None = DESCRIPTION,
) -> Path:
    """What ``migrate`` with x-ignore-shared writes: pc.ram is elsewhere."""
    tail = b"" if description is None else described_as(description)
    path.write_bytes(head + pages + before + end(1, MARK) + sections + EOF + tail)
    return path


def device_file(path: Path, sections: bytes = SECTIONS) -> Path:
    """What ``xen-save-devices-state`` writes."""
    path.write_bytes(b"QEVM" + struct.pack(">I", 3) + sections + EOF)
    return path


def devices_of(path: Path, **options: Any) -> DeviceState:
    return read_devices(path, **{"machine": "pc-q35-10.0", "blocks": BLOCKS, **options})


def memory(length: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8).tobytes()


def test_migrated_state_has_all_but_the_pages_left_out(tmp_path: Path) -> None:
    state = read_migrated(migrated(tmp_path / "state"))
    assert (state.machine, state.page_size) == ("pc-q35-10.0", 4096)
    assert [*state.blocks.items()] == [*BLOCKS.items()]
    assert state.external == ("pc.ram",)
    assert bytes(state.carried["pc.rom"]) == bytes(4096) + ROM_PAGE
    assert bytes(state.carried["empty"]) == bytes(4096)
    assert state.sections == SECTIONS
    assert state.devices == (("timer", 0), ("globalstate", 0))
    assert state.description == DESCRIPTION
    assert state.run_state == "running"
    assert state.switchover_start


def test_state_is_read_through_a_descriptor_of_an_unnamed_file(tmp_path: Path) -> None:
    content = migrated(tmp_path / "state").read_bytes()
    writer = os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY)
    reader = os.open(f"/proc/self/fd/{writer}", os.O_RDONLY)
    try:
        os.write(writer, content)
        assert read_migrated(Descriptors(reader)).sections == SECTIONS
    finally:
        os.close(writer)
        os.close(reader)


def test_older_machine_has_no_switchover_command(tmp_path: Path) -> None:
    assert not read_migrated(migrated(tmp_path / "state", before=b"")).switchover_start


def test_state_without_a_description_is_whole_too(tmp_path: Path) -> None:
    state = read_migrated(migrated(tmp_path / "state", description=None))
    assert (state.sections, state.description) == (SECTIONS, None)


def test_uuid_and_page_bits_are_kept(tmp_path: Path) -> None:
    bits = b"\x05" + str8("configuration/target-page-bits") + struct.pack(">II", 1, 12)
    uuid = b"\x05" + str8("configuration/uuid") + struct.pack(">I", 1) + bytes(range(16))
    head = configured(bits, IGNORES, uuid, machine=b"virt-10.0") + listed(BLOCKS)
    state = read_migrated(migrated(tmp_path / "state", head=head))
    assert (state.target_page_bits, state.uuid) == (12, bytes(range(16)))
    write_snapshot(tmp_path / "snap", state, {"pc.ram": bytes(RAM)})
    with open_snapshot(tmp_path / "snap") as snapshot:
        stream = snapshot.stream
        assert (stream.machine, stream.target_page_bits, stream.uuid) == (
            "virt-10.0",
            12,
            bytes(range(16)),
        )
        assert stream.capabilities == ("mapped-ram",)


def test_block_known_to_be_elsewhere_is_not_read(tmp_path: Path) -> None:
    state = read_migrated(migrated(tmp_path / "state"), elsewhere=["pc.rom", "no such block"])
    assert state.external == ("pc.ram", "pc.rom")
    assert [*state.carried] == ["empty"]


@pytest.mark.parametrize("length", range(1, 400, 7))
def test_stream_cut_at_its_end_is_refused(tmp_path: Path, length: int) -> None:
    path = migrated(tmp_path / "state")
    os.truncate(path, path.stat().st_size - length)
    with pytest.raises(SnapshotError):
        read_migrated(path)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(SnapshotError):
        read_migrated(tmp_path / "state")
    with pytest.raises(SnapshotError):
        devices_of(tmp_path / "state")


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError):
        read_migrated(tmp_path / "state")
    with pytest.raises(TargetError):
        devices_of(tmp_path / "state")


def test_page_of_a_block_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    pages = part(1, word(0, ZERO) + str8(b"other") + b"\0" + MARK)
    with pytest.raises(SnapshotError, match="not listed"):
        read_migrated(migrated(tmp_path / "state", pages=pages))


def test_device_with_state_in_several_parts_is_named(tmp_path: Path) -> None:
    live = start(9, "dirty-bitmap", 1, b"\x01")
    ended = end(9, b"\x01")
    with pytest.raises(NotSupported, match="dirty-bitmap"):
        read_migrated(migrated(tmp_path / "state", before=live, sections=ended + SECTIONS))


def test_device_whose_state_is_before_ram_is_named(tmp_path: Path) -> None:
    early = full(3, "virtio-mem-device-early", b"12345678")
    path = migrated(
        tmp_path / "state",
        pages=early + PAGES,
        description=described(
            device("virtio-mem-device-early", 8), device("timer", 5), device("globalstate", 104)
        ),
    )
    with pytest.raises(NotSupported, match="virtio-mem-device-early"):
        read_migrated(path)


def test_mapped_ram_stream_is_another_kind(tmp_path: Path) -> None:
    write_snapshot(
        tmp_path / "snap", devices_of(device_file(tmp_path / "state")), given_all(BLOCKS)
    )
    with pytest.raises(NotSupported, match="mapped-ram"):
        read_migrated(tmp_path / "snap")


def given_all(names: Mapping[str, int]) -> dict[str, bytes]:
    return {name: memory(length, seed) for seed, (name, length) in enumerate(names.items())}


def test_device_state_is_distinguished_without_a_description(tmp_path: Path) -> None:
    state = devices_of(device_file(tmp_path / "state"))
    assert state.sections == SECTIONS
    assert state.devices == (("timer", 0), ("globalstate", 0))
    assert state.run_state == "running"
    assert state.external == tuple(BLOCKS)
    assert not state.carried


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)


@some
@given(st.lists(st.tuples(NAMES, st.binary(max_size=300), st.integers(0, 5)), max_size=12))
def test_any_sections_are_found_again(
    tmp_path: Path, devices: Sequence[tuple[str, bytes, int]]
) -> None:
    parts = [
        full(number, name, body, instance=instance)
        for number, (name, body, instance) in enumerate(devices)
    ]
    state = devices_of(device_file(tmp_path / "state", b"".join(parts)))
    assert state.devices == tuple((name, instance) for name, _, instance in devices)
    assert state.sections == b"".join(parts)


def test_run_state_is_replaced_where_one_is_given(tmp_path: Path) -> None:
    state = devices_of(device_file(tmp_path / "state"), run_state="paused")
    assert state.run_state == "paused"
    assert state.sections == TIMER + full(8, "globalstate", global_state("paused").data)


@pytest.mark.parametrize("run_state", ["", "x" * 32, "päused"])
def test_run_state_that_does_not_fit_is_refused(tmp_path: Path, run_state: str) -> None:
    with pytest.raises(UsageError, match="not a run state"):
        devices_of(device_file(tmp_path / "state"), run_state=run_state)


def test_run_state_cannot_be_replaced_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="no run state"):
        devices_of(device_file(tmp_path / "state", TIMER), run_state="paused")


@pytest.mark.parametrize("length", range(1, len(SECTIONS) + 9))
def test_device_state_that_was_cut_is_refused(tmp_path: Path, length: int) -> None:
    path = device_file(tmp_path / "state")
    os.truncate(path, path.stat().st_size - length)
    with pytest.raises(SnapshotError):
        devices_of(path)


@pytest.mark.parametrize(
    "sections",
    [
        start(1, "ram", 4, words(4096 | 4) + entry("pc.ram", 4096) + MARK) + SECTIONS,
        SECTIONS + command(11),
        SECTIONS + part(3, b""),
        SECTIONS + EOF + b"QEVM\0\0\0\x03" + SECTIONS,
        SECTIONS + EOF,
        b"\x07" + SECTIONS,
    ],
    ids=["ram", "command", "part", "two", "longer", "configuration"],
)
def test_file_that_is_not_device_state_alone_is_refused(tmp_path: Path, sections: bytes) -> None:
    with pytest.raises(SnapshotError):
        devices_of(device_file(tmp_path / "state", sections))


@pytest.mark.parametrize("head", [b"QEVM\0\0\0\x02", b"QEVM\0\0\0\x03\x07", b"TEVM\0\0\0\x03"])
def test_file_of_another_kind_is_refused(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "state").write_bytes(head + SECTIONS + EOF)
    with pytest.raises(SnapshotError):
        devices_of(tmp_path / "state")


@pytest.mark.parametrize("names", [{"": 4096}, {"ram": 0}, {"ram": 4095}, {"x" * 256: 4096}])
def test_blocks_that_cannot_be_are_refused(tmp_path: Path, names: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        devices_of(device_file(tmp_path / "state"), blocks=names)


def test_snapshot_of_migrated_state_has_pages_from_both(disk: Path) -> None:
    state = read_migrated(migrated(disk / "state"))
    ram = memory(RAM)
    report = write_snapshot(disk / "snap", state, {"pc.ram": ram})
    assert report.data_pages == 64 + 1
    with open_snapshot(disk / "snap") as snapshot:
        snapshot.verify()
        assert snapshot.machine == "pc-q35-10.0"
        assert [*snapshot.blocks] == [*BLOCKS]
        full = [s.name for s in snapshot.stream.sections if s.kind.name in ("FULL", "COMMAND")]
        assert full == ["switchover-start", "timer", "globalstate"]
    loaded = load(disk / "snap")
    assert loaded["pc.ram"].tobytes() == ram
    assert loaded["pc.rom"].tobytes() == bytes(4096) + ROM_PAGE
    assert not loaded["empty"].any()
    described = with_configuration(DESCRIPTION, Configuration("pc-q35-10.0", ("mapped-ram",)))
    tail = (disk / "snap").read_bytes()
    assert tail.endswith(end(RAM_SECTION_ID, MARK) + SECTIONS + EOF + described_as(described))


def test_snapshot_of_device_state_is_whole(disk: Path) -> None:
    state = devices_of(device_file(disk / "state"))
    memories = given_all(BLOCKS)
    write_snapshot(disk / "snap", state, memories)
    with open_snapshot(disk / "snap") as snapshot:
        snapshot.verify()
        assert snapshot.stream.complete
        assert not snapshot.stream.opaque_tail
        names = [s.name for s in snapshot.stream.sections if s.kind.name == "FULL"]
        assert names == ["timer", "globalstate"]
    assert {n: m.tobytes() for n, m in load(disk / "snap").items()} == memories
    assert end(RAM_SECTION_ID, MARK) + SECTIONS + EOF in (disk / "snap").read_bytes()


def test_carried_block_of_some_pages_is_zero_elsewhere(tmp_path: Path) -> None:
    pages = part(1, word(4096, PAGE) + str8(b"pc.ram") + ROM_PAGE + MARK)
    state = read_migrated(migrated(tmp_path / "state", pages=pages))
    assert state.external == ("pc.rom", "empty")
    assert bytes(state.carried["pc.ram"]) == bytes(4096) + ROM_PAGE + bytes(RAM - 8192)
