"""Incoming migrations: what comes back, and what is refused."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import pytest

from pyqmigrate import FileMemory, RamBlock, UsageError, open_snapshot
from pyqmigrate.format.device.sections import DeviceSection
from pyqmigrate.migration import Guest, Migration
from pyqmigrate.qapi.address import parse_uri
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qapi.status import RunState, Status
from tests.harness.migrations import LENGTH, Recorder, memory

KINDS = [{"mapped-ram": True}, {"mapped-ram": True, "multifd": True}, {}]


class WithDevices(Guest):
    def __init__(self, devices: Sequence[DeviceSection] = ()) -> None:
        self.devices = devices
        self.got: list[DeviceSection] = []
        self.running = False

    def save_devices(self) -> Sequence[DeviceSection]:
        return self.devices

    def load_devices(self, devices: Sequence[DeviceSection]) -> None:
        self.got = list(devices)

    def cont(self) -> None:
        self.running = True


def save(path: Path, kind: dict[str, bool], **options: object) -> mmap.mmap:
    ram = memory()
    source = Migration([RamBlock("pc.ram", ram)], **options)  # type: ignore[arg-type]
    source.set_capabilities(kind)
    source.migrate(parse_uri(f"file:{path}"))
    info = source.wait(60)
    assert info.status is Status.COMPLETED, info
    return ram


@pytest.mark.parametrize("kind", KINDS, ids=["single", "multifd", "sequential"])
def test_memory_and_devices_come_back_in_order(disk: Path, kind: dict[str, bool]) -> None:
    devices = [
        DeviceSection("cpu", b"\x00\x7e\x00\x00\x00\x02" * 9, 1, 12),
        DeviceSection("clock", b"", 0, 1),
        DeviceSection("cpu", b"second", 2, 12),
    ]
    ram = save(disk / "snap", kind, guest=WithDevices(devices))
    target, guest = bytearray(b"\xff" * LENGTH), WithDevices()
    incoming = Migration([RamBlock("pc.ram", target)], guest=guest, incoming=True)
    incoming.set_capabilities(kind)
    recorder = Recorder(incoming)
    incoming.migrate_incoming(parse_uri(f"file:{disk}/snap"))
    assert incoming.wait(60).status is Status.COMPLETED, incoming.query()
    assert bytes(target) == ram[:]
    assert [device for device in guest.got if device.name != "globalstate"] == devices
    assert guest.running
    assert incoming.run_state is RunState.RUNNING
    assert recorder.seen == ["setup", "active", "RESUME", "completed"]


@pytest.mark.parametrize("stored", [RunState.PAUSED, RunState.PRELAUNCH])
def test_a_guest_that_was_stopped_stays_so(disk: Path, stored: RunState) -> None:
    save(disk / "snap", {"mapped-ram": True}, run_state=stored)
    guest = WithDevices()
    incoming = Migration([RamBlock("pc.ram", bytearray(LENGTH))], guest=guest, incoming=True)
    incoming.set_capabilities({"mapped-ram": True})
    incoming.migrate_incoming(parse_uri(f"file:{disk}/snap"))
    incoming.wait(60)
    assert incoming.run_state is stored
    assert not guest.running


def test_a_guest_that_is_not_to_start_is_paused(disk: Path) -> None:
    save(disk / "snap", {"mapped-ram": True})
    incoming = Migration([RamBlock("pc.ram", bytearray(LENGTH))], incoming=True, autostart=False)
    incoming.set_capabilities({"mapped-ram": True})
    incoming.migrate_incoming(parse_uri(f"file:{disk}/snap"))
    incoming.wait(60)
    assert incoming.run_state is RunState.PAUSED


@pytest.mark.parametrize("on", [True, False])
def test_a_stream_of_the_other_kind_fails(disk: Path, on: bool) -> None:
    save(disk / "snap", {"mapped-ram": not on})
    incoming = Migration([RamBlock("pc.ram", bytearray(LENGTH))], incoming=True)
    incoming.set_capabilities({"mapped-ram": on})
    incoming.migrate_incoming(parse_uri(f"file:{disk}/snap"), exit_on_error=False)
    info = incoming.wait(60)
    assert info.status is Status.FAILED
    assert f"Capability mapped-ram is {'on' if on else 'off'}" in info.error
    assert incoming.run_state is RunState.INMIGRATE


OURS, THEIRS = UUID(int=1), UUID(int=2)


@pytest.mark.parametrize("kind", KINDS, ids=["single", "multifd", "sequential"])
@pytest.mark.parametrize(
    ("told", "local", "checked", "fits"),
    [
        (OURS, OURS, True, True),
        (OURS, THEIRS, True, False),
        (None, THEIRS, True, True),
        (OURS, None, True, True),
        (OURS, THEIRS, False, True),
    ],
)
def test_identities_are_compared_where_both_are_known(
    disk: Path,
    kind: dict[str, bool],
    told: UUID | None,
    local: UUID | None,
    checked: bool,
    fits: bool,
) -> None:
    wanted = {**kind, "validate-uuid": checked}
    save(disk / "snap", wanted, uuid=told)
    incoming = Migration([RamBlock("pc.ram", bytearray(LENGTH))], incoming=True, uuid=local)
    incoming.set_capabilities(wanted)
    incoming.migrate_incoming(parse_uri(f"file:{disk}/snap"), exit_on_error=False)
    info = incoming.wait(60)
    assert info.status is (Status.COMPLETED if fits else Status.FAILED)
    if not fits:
        assert f"UUID received is {OURS} and local is {THEIRS}" in info.error


@pytest.mark.parametrize("kind", KINDS, ids=["single", "multifd", "sequential"])
@pytest.mark.parametrize("on", [True, False])
def test_ignoring_shared_memory_is_agreed_upon(disk: Path, kind: dict[str, bool], on: bool) -> None:
    ram = save(disk / "snap", {**kind, "x-ignore-shared": on})
    for ours in (True, False):
        target = bytearray(LENGTH)
        incoming = Migration([RamBlock("pc.ram", target)], incoming=True)
        incoming.set_capabilities({**kind, "x-ignore-shared": ours})
        incoming.migrate_incoming(parse_uri(f"file:{disk}/snap"), exit_on_error=False)
        info = incoming.wait(60)
        if ours == on:
            assert info.status is Status.COMPLETED
            assert bytes(target) == ram[:]
        else:
            assert info.status is Status.FAILED
            assert "Capability x-ignore-shared is" in info.error


def test_a_sequential_stream_leaves_shared_memory_where_it_is(disk: Path) -> None:
    with (disk / "ram").open("w+b") as shared:
        shared.write(b"kept" * (LENGTH // 4))
        shared.flush()
        blocks = [RamBlock("pc.ram", FileMemory(shared.fileno())), RamBlock("rom", memory())]
        source = Migration(blocks)
        source.set_capabilities({"x-ignore-shared": True})
        source.migrate(parse_uri(f"file:{disk}/snap"))
        assert source.wait(60).status is Status.COMPLETED
        assert (disk / "snap").stat().st_size < 2 * LENGTH
        rom = bytearray(LENGTH)
        incoming = Migration([blocks[0], RamBlock("rom", rom)], incoming=True)
        incoming.set_capabilities({"x-ignore-shared": True})
        incoming.migrate_incoming(parse_uri(f"file:{disk}/snap"))
        assert incoming.wait(60).status is Status.COMPLETED
        assert bytes(rom) == memory()[:]
        assert (disk / "ram").read_bytes() == b"kept" * (LENGTH // 4)


@pytest.mark.parametrize("policy", [Policy.STRICT, Policy.COMPAT_11_1])
@pytest.mark.parametrize("kind", KINDS[:2], ids=["single", "multifd"])
def test_a_mapped_ram_file_leaves_shared_memory_where_it_is(
    disk: Path, policy: Policy, kind: dict[str, bool]
) -> None:
    with (disk / "ram").open("w+b") as shared:
        shared.write(b"kept" * (LENGTH // 4))
        shared.flush()
        blocks = [RamBlock("pc.ram", FileMemory(shared.fileno())), RamBlock("rom", memory())]
        source = Migration(blocks, policy=policy)
        source.set_capabilities({**kind, "x-ignore-shared": True})
        source.migrate(parse_uri(f"file:{disk}/snap"))
        info = source.wait(60)
        assert info.status is Status.COMPLETED
        assert info.ram is not None and info.ram.total == LENGTH  # rom's
        with open_snapshot(disk / "snap") as snapshot:
            snapshot.verify()
            assert [block.external for block in snapshot.blocks.values()] == [True, False]
            with pytest.raises(UsageError):
                snapshot.blocks["pc.ram"].read(0, 4096)
        rom = bytearray(LENGTH)
        incoming = Migration([blocks[0], RamBlock("rom", rom)], incoming=True, policy=policy)
        incoming.set_capabilities({**kind, "x-ignore-shared": True})
        incoming.migrate_incoming(parse_uri(f"file:{disk}/snap"))
        assert incoming.wait(60).status is Status.COMPLETED
        assert bytes(rom) == memory()[:]
        assert (disk / "ram").read_bytes() == b"kept" * (LENGTH // 4)


def test_as_in_qemu_10_a_mapped_ram_file_cannot_leave_shared_memory_out(disk: Path) -> None:
    with (disk / "ram").open("w+b") as shared:
        shared.truncate(LENGTH)
        wanted = {Policy.COMPAT_10_0: Status.FAILED, Policy.STRICT: Status.COMPLETED}
        for policy, ends in wanted.items():
            source = Migration([RamBlock("pc.ram", FileMemory(shared.fileno()))], policy=policy)
            source.set_capabilities({"x-ignore-shared": True, "mapped-ram": True})
            source.migrate(parse_uri(f"file:{disk}/snap"))
            info = source.wait(60)
            assert info.status is ends
            if ends is Status.FAILED:
                assert info.error == "Unable to write to file: Bad address"
        incoming = Migration(
            [RamBlock("pc.ram", FileMemory(shared.fileno()))],
            incoming=True,
            policy=Policy.COMPAT_10_0,
        )
        incoming.set_capabilities({"x-ignore-shared": True, "mapped-ram": True})
        incoming.migrate_incoming(parse_uri(f"file:{disk}/snap"), exit_on_error=False)
        assert incoming.wait(60).error == "load of migration failed: Invalid argument"


def test_a_damaged_stream_ends_the_program_only_where_that_was_asked(disk: Path) -> None:
    (disk / "junk").write_bytes(b"junk" * 4096)
    for exit_on_error in (True, False):
        ended: list[bool] = []
        incoming = Migration(
            [RamBlock("pc.ram", bytearray(LENGTH))],
            incoming=True,
            on_exit=lambda ended=ended: ended.append(True),  # type: ignore[misc]
        )
        incoming.set_capabilities({"mapped-ram": True})
        incoming.migrate_incoming(parse_uri(f"file:{disk}/junk"), exit_on_error=exit_on_error)
        assert incoming.wait(60).status is Status.FAILED
        incoming.close()
        assert bool(ended) == exit_on_error


def test_a_failed_open_may_be_tried_again_and_in_compat_may_not(disk: Path) -> None:
    save(disk / "snap", {"mapped-ram": True})
    for policy in Policy:
        incoming = Migration([RamBlock("pc.ram", bytearray(LENGTH))], incoming=True, policy=policy)
        incoming.set_capabilities({"mapped-ram": True})
        with pytest.raises(OSError, match="Could not open '/nonexistent': No such file"):
            incoming.migrate_incoming(parse_uri("file:/nonexistent"))
        if policy.compat:
            with pytest.raises(UsageError, match="Illegal migration incoming state: setup"):
                incoming.migrate_incoming(parse_uri(f"file:{disk}/snap"))
        else:
            incoming.migrate_incoming(parse_uri(f"file:{disk}/snap"))
            assert incoming.wait(60).status is Status.COMPLETED


def test_it_is_accepted_once_and_only_when_waited_for(disk: Path) -> None:
    save(disk / "snap", {"mapped-ram": True})
    address = parse_uri(f"file:{disk}/snap")
    with pytest.raises(UsageError, match="'-incoming' was not specified"):
        Migration([RamBlock("pc.ram", bytearray(LENGTH))]).migrate_incoming(address)
    incoming = Migration([RamBlock("pc.ram", bytearray(LENGTH))], incoming=True)
    incoming.set_capabilities({"mapped-ram": True})
    with pytest.raises(UsageError, match="Guest is waiting for an incoming migration"):
        incoming.migrate(address)
    incoming.migrate_incoming(address)
    incoming.wait(60)
    with pytest.raises(UsageError, match="already been started"):
        incoming.migrate_incoming(address)


def test_a_block_that_the_stream_lacks_fails_the_load(disk: Path) -> None:
    save(disk / "snap", {"mapped-ram": True})
    blocks = [RamBlock("pc.ram", bytearray(LENGTH)), RamBlock("vga.vram", bytearray(4096))]
    incoming = Migration(blocks, incoming=True)
    incoming.set_capabilities({"mapped-ram": True})
    incoming.migrate_incoming(parse_uri(f"file:{disk}/snap"), exit_on_error=False)
    info = incoming.wait(60)
    assert info.status is Status.FAILED
    assert "vga.vram" in info.error
