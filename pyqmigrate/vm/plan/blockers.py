"""State that engine ``direct`` cannot save.

QEMU writes its device state in one of two ways (:class:`DeviceStateMethod`). Neither includes live
sections other than RAM: their parts are interleaved with those of RAM, and only the devices know
their format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum

from pyqmigrate.vm.guest.inspect import GuestInfo

__all__ = [
    "DeviceStateMethod",
    "devices_with_backends",
    "missed_devices",
    "why_no_migration",
    "why_no_migration_now",
]


class DeviceStateMethod(StrEnum):
    """How QEMU writes its device state without the pages."""

    IGNORE_SHARED = "ignore-shared"
    """``migrate`` with ``x-ignore-shared``: complete and described, shared file-backed RAM left
    out; a guest that was not running ends in ``postmigrate``."""
    DEVICES_ONLY = "devices-only"
    """``xen-save-devices-state``: device sections only; a guest that is not running keeps its
    state. Only x86 builds of QEMU have it."""


_DEVICES = (
    (
        re.compile(r"vfio-"),
        "it passes a host device through (vfio), whose live state is not in a section",
    ),
    (
        re.compile(r"virtio-mem(?!ory)"),
        "its plugged memory (virtio-mem) is recorded in a section before RAM",
    ),
)
_BACKENDS = re.compile(r"vhost-|tpm-")
# Machines with a live section of their own.
_MACHINES = (
    (re.compile(r"pseries"), "the hash page table of this machine is a live section (spapr/htab)"),
    (
        re.compile(r"s390-ccw"),
        "the storage attributes of this machine are a live section (s390-storage_attributes)",
    ),
)
# Capabilities that add to a stream, or remove RAM from it.
_CAPABILITIES = {
    "block": "the capability block puts disks into the stream",
    "x-colo": "with the capability x-colo, a migration is not a snapshot",
}


def missed_devices(guest: GuestInfo, way: DeviceStateMethod) -> list[str]:
    """Return reasons why a save this way would lose state; empty if it would not.

    Only QEMU's own information is used: a live section of a device not listed here is noticed when
    its stream is read.
    """
    reasons = list(_from_devices(guest))
    reasons += [why for pattern, why in _MACHINES if pattern.match(guest.machine)]
    reasons += [why for name, why in _CAPABILITIES.items() if guest.capabilities.get(name)]
    if guest.dirty_bitmaps and guest.capabilities.get("dirty-bitmaps"):
        names = ", ".join(f"{name} of {node}" for node, name in guest.dirty_bitmaps)
        reasons.append(f"dirty bitmaps are a live section (dirty-bitmaps is on): {names}")
    if way is DeviceStateMethod.IGNORE_SHARED and "x-ignore-shared" not in guest.capabilities:
        reasons.append("this QEMU has no x-ignore-shared")
    if way is DeviceStateMethod.DEVICES_ONLY and "xen-save-devices-state" not in guest.commands:
        reasons.append("this QEMU has no xen-save-devices-state (builds for x86 have it)")
    if way is DeviceStateMethod.DEVICES_ONLY and guest.target_page_bits is None:
        reasons.append(
            "xen-save-devices-state does not record the page size, which differs between machines "
            f"of {guest.target}"
        )
    return reasons


def _from_devices(guest: GuestInfo) -> Iterator[str]:
    for pattern, why in _DEVICES:
        for path, kind in guest.devices:
            if pattern.match(kind):
                yield f"{path.rpartition('/')[2]} ({kind}): {why}"


def devices_with_backends(guest: GuestInfo) -> list[str]:
    """Return devices whose state is in another process, which may not provide it."""
    return [
        f"{path.rpartition('/')[2]} ({kind})"
        for path, kind in guest.devices
        if _BACKENDS.match(kind)
    ]


def why_no_migration(guest: GuestInfo) -> str | None:
    """Return why no engine can save this guest now; None if one may."""
    if guest.blocked_reasons:
        return "QEMU refuses to migrate this guest: " + "; ".join(guest.blocked_reasons)
    if not guest.blocks:
        return "the guest has no memory (a machine without RAM)"
    if guest.run_state == "inmigrate":
        return "there is no guest yet: this QEMU waits for an incoming migration"
    return why_no_migration_now(guest.migration_status)


def why_no_migration_now(status: str) -> str | None:
    """Return why a QEMU with this ``query-migrate`` status refuses another migration, or None."""
    if status in _UNDER_WAY:
        return f"a migration of this guest is under way (status {status})"
    return None


_UNDER_WAY = {
    "setup",
    "active",
    "pre-switchover",
    "device",
    "cancelling",
    "failing",
    "wait-unplug",
    "colo",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover",
    "postcopy-recover-setup",
    "postcopy-device",
}
