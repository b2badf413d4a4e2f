"""Who writes the pages, decided for guests of all kinds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pyqmigrate.errors import NotSupported, QemuError, UsageError
from pyqmigrate.vm.guest.disks import Disk
from pyqmigrate.vm.guest.inspect import GuestBlock, GuestInfo
from pyqmigrate.vm.plan.blockers import DeviceStateMethod, missed_devices, why_no_migration
from pyqmigrate.vm.plan.disks import restore_needs
from pyqmigrate.vm.plan.engine import Engine, choose_engine
from tests.harness.guest_info import MIB, file_block, guest, private_block


def out_of_reach(block: GuestBlock) -> GuestBlock:
    return replace(block, memory=None, why_not="no privilege")


NO_XEN = frozenset({"migrate"})


def chosen(one: GuestInfo, **asked: Any) -> tuple[Engine, DeviceStateMethod | None, bool]:
    choice = choose_engine(one, **asked)
    assert choice.why
    return choice.engine, choice.way, choice.stays


IGNORING = (Engine.DIRECT, DeviceStateMethod.IGNORE_SHARED)
DEVICES = (Engine.DIRECT, DeviceStateMethod.DEVICES_ONLY)
QEMU = (Engine.QEMU, None)


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (guest(), (*IGNORING, True)),
        (guest(running=False), (*DEVICES, True)),
        (guest(private_block("ram", 4096)), (*DEVICES, True)),
        (guest(file_block(file_backed=False), private_block()), (*DEVICES, True)),
        # What is private goes through QEMU's own stream, if it is little.
        (guest(file_block(), out_of_reach(private_block())), (*IGNORING, True)),
        (guest(file_block(), private_block("other", 4096)), (*DEVICES, True)),
        (guest(file_block(), out_of_reach(private_block("other", 4096))), (*QEMU, True)),
        (guest(out_of_reach(file_block())), (*QEMU, True)),
        # Without the command that leaves a paused guest paused, nothing can.
        (guest(running=False, commands=NO_XEN), (*IGNORING, False)),
        (guest(file_block(), out_of_reach(private_block()), running=False), (*IGNORING, False)),
        (guest(private_block("ram", 4096), running=False, commands=NO_XEN), (*QEMU, False)),
        (guest(running=False, run_state="postmigrate"), (*DEVICES, True)),
        (guest(capabilities={"mapped-ram": False}), (*DEVICES, True)),
    ],
)
def test_engine_fits_the_guest(
    one: GuestInfo, expected: tuple[Engine, DeviceStateMethod | None, bool]
) -> None:
    assert chosen(one) == expected


def test_qemus_engine_is_taken_when_it_is_asked_for() -> None:
    assert chosen(guest(), engine="qemu") == (*QEMU, True)
    assert chosen(guest(running=False), engine="qemu") == (*QEMU, False)
    assert choose_engine(guest(), engine="qemu").refused == ()


def test_direct_that_is_asked_for_and_refused_is_an_error_with_every_reason() -> None:
    one = guest(out_of_reach(file_block()), devices=(("/machine/peripheral/gpu", "vfio-pci"),))
    with pytest.raises(NotSupported, match=r"gpu \(vfio-pci\).*ram: no privilege"):
        choose_engine(one, engine="direct")


def test_reason_that_counts_for_both_ways_is_reported_once() -> None:
    one = guest(devices=(("/machine/peripheral/gpu", "vfio-pci"),))
    assert len([r for r in choose_engine(one).refused if "gpu" in r]) == 1


def test_unknown_engine_is_refused() -> None:
    with pytest.raises(UsageError, match="engine must be"):
        choose_engine(guest(), engine="fast")


def test_qemu_without_mapped_ram_saves_only_by_us() -> None:
    one = guest(version=(8, 2, 0), capabilities={"x-ignore-shared": False})
    assert chosen(one) == (*IGNORING, True)
    with pytest.raises(NotSupported, match=r"8\.2\.0.*mapped-ram"):
        choose_engine(one, engine="qemu")


def test_guest_in_postmigrate_is_not_saved_by_qemu_again() -> None:
    one = guest(running=False, run_state="postmigrate", commands=NO_XEN)
    with pytest.raises(NotSupported, match="cont"):
        choose_engine(one)


def test_sleeping_guest_is_not_migrated() -> None:
    """QEMU would die of it when the guest is to go on."""
    assert chosen(guest(run_state="suspended")) == (*DEVICES, True)
    with pytest.raises(NotSupported, match="wake it"):
        choose_engine(guest(run_state="suspended"), engine="qemu")
    with pytest.raises(NotSupported, match="wake it"):
        choose_engine(guest(run_state="suspended", commands=NO_XEN))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blocks": ()}, "no memory"),
        ({"blocked_reasons": ("a device", "another")}, "a device; another"),
        ({"run_state": "inmigrate"}, "incoming"),
        ({"migration_status": "active"}, "under way"),
        ({"migration_status": "pre-switchover"}, "under way"),
        ({"migration_status": "postcopy-active"}, "under way"),
    ],
)
@pytest.mark.parametrize("engine", ["auto", "direct", "qemu"])
def test_guest_that_cannot_be_saved_now(changes: dict[str, Any], words: str, engine: str) -> None:
    with pytest.raises(QemuError, match=words):
        choose_engine(replace(guest(), **changes), engine=engine)


@pytest.mark.parametrize("status", ["none", "completed", "failed", "cancelled"])
def test_migration_that_has_ended_is_harmless(status: str) -> None:
    assert why_no_migration(guest(migration_status=status)) is None


@pytest.mark.parametrize("way", list(DeviceStateMethod))
@pytest.mark.parametrize(
    "changes",
    [
        {"devices": (("/machine/peripheral/a", "vfio-pci"),)},
        {"devices": (("/machine/peripheral/a", "vfio-pci-nohotplug"),)},
        {"devices": (("/machine/peripheral/a", "virtio-mem-pci"),)},
        {"devices": (("/machine/peripheral/a", "virtio-mem"),)},
        {"machine": "pseries-10.0"},
        {"machine": "s390-ccw-virtio-10.0"},
        {
            "capabilities": {"dirty-bitmaps": True, "x-ignore-shared": False},
            "dirty_bitmaps": (("disk", "bits"),),
        },
        {"capabilities": {"block": True, "x-ignore-shared": False}},
        {"capabilities": {"x-colo": True, "x-ignore-shared": False}},
    ],
)
def test_what_would_be_missed_is_reported(way: DeviceStateMethod, changes: dict[str, Any]) -> None:
    assert len(missed_devices(guest(**changes), way)) == 1


@pytest.mark.parametrize("way", list(DeviceStateMethod))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"devices": (("/machine/peripheral/a", "virtio-net-pci"), ("/b", "virtio-memory-x"))},
        # Bitmaps that do not migrate are in nobody's stream.
        {"dirty_bitmaps": (("disk", "bits"),)},
    ],
)
def test_nothing_is_missed_of_a_plain_guest(
    way: DeviceStateMethod, changes: dict[str, Any]
) -> None:
    assert missed_devices(guest(**changes), way) == []


DISK = Disk("system", "", "node", "/images/a.qcow2", "qcow2", True, MIB)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"resumed": True}, "runs ahead"),
        ({"resumed": False}, "must be as it is now"),
        ({"resumed": True, "with_disks": True}, "new overlay"),
    ],
)
def test_restore_needs_are_said_of_each_writable_disk(how: dict[str, bool], words: str) -> None:
    (sentence,) = restore_needs([DISK, replace(DISK, writable=False)], **how)
    assert words in sentence and "/images/a.qcow2" in sentence and "system" in sentence
