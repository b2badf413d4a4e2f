"""Which of QEMU's migration settings a save needs, and why.

A save changes capabilities and parameters of a QEMU that is somebody else's: only what has to
change, and every change has a reason that a person can read.
:mod:`pyqmigrate.vm.outgoing.transaction` puts all of them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pyqmigrate.errors import NotSupported
from pyqmigrate.snapshot.save.writer import Sparse
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.sampling import Contents

__all__ = [
    "WRITE_SECONDS",
    "Change",
    "Changes",
    "UsedSetting",
    "Value",
    "for_device_state",
    "for_pages",
    "no_changes",
    "writes_all",
]

Value: TypeAlias = bool | int | str

# What one more write costs besides its bytes, direct or (with the fsync) buffered; and what a
# disk takes. Measured on a virtio disk.
WRITE_SECONDS = 40e-6
_DISK_RATE = 1.5e9  # bytes/s

# Capabilities that do not go with a save to a file, or would hurt the guest.
_OFF = {
    "xbzrle": "deltas of pages have no place in the file",
    "postcopy-ram": "it needs an answer from the destination",
    "postcopy-preempt": "it needs postcopy-ram",
    "postcopy-blocktime": "it is for postcopy-ram",
    "return-path": "a file gives no answer",
    "switchover-ack": "it needs return-path",
    "x-colo": "a file is no second guest",
    "release-ram": "it gives the guest's pages away once they are sent",
    "background-snapshot": "it writes a file of another kind",
    "zero-copy-send": "it is for sockets",
    "compress": "compressed pages have no place in the file",
    "block": "disks are not saved this way",
}
_EVENTS: Mapping[str, tuple[bool, str]] = {
    "events": (True, "QEMU reports the end of the migration at once")
}
_PLAIN_FAST: Mapping[str, tuple[Value, str]] = {
    "max-bandwidth": (0, "no limit"),
    "multifd-compression": ("none", "compressed pages have no place in the file"),
    "tls-creds": ("", "a file is not encrypted on the wire"),
    "mode": ("normal", "the others are for restarting a host"),
}
# Half a second's downtime at this rate is more than any guest has: QEMU stops the guest after its
# first look at the rate (100 ms), and the snapshot still says that it ran.
_ANY_RATE = 1 << 50  # bytes/s
# What a live save, and the end of one that is cancelled, may change further.
_TOUCHED = ("downtime-limit", "max-bandwidth")
_AT_ONCE: Mapping[str, tuple[Value, str]] = {
    "avail-switchover-bandwidth": (_ANY_RATE, "so that QEMU stops the guest at once"),
    "downtime-limit": (1000, "so that QEMU stops the guest at once"),
}


@dataclass(frozen=True)
class Change:
    """A setting to change: what it was, what it will be, and why."""

    before: Value
    after: Value
    why: str


@dataclass(frozen=True)
class UsedSetting:
    """A setting of QEMU's that a save changes for its time: the value, and why."""

    value: Value
    why: str


@dataclass(frozen=True)
class Changes:
    """Capabilities and parameters to change, by QEMU's names.

    ``touched`` are the values of parameters that may change later, while QEMU saves.
    """

    capabilities: Mapping[str, Change]
    parameters: Mapping[str, Change]
    touched: Mapping[str, Value]

    def used(self) -> dict[str, UsedSetting]:
        """What the settings are meanwhile, by their names."""
        both = {**self.capabilities, **self.parameters}
        return {name: UsedSetting(change.after, change.why) for name, change in both.items()}


def for_pages(
    guest: GuestInfo,
    *,
    channels: int,
    direct: bool,
    sparse: Sparse,
    pause: bool,
    contents: Contents | None,
) -> Changes:
    """For engine ``qemu``: QEMU writes a mapped-ram file.

    ``direct``: direct I/O is possible; ``contents`` is an estimate of what
    the guest's memory holds; ``pause``: something is to be done while the guest stands. Raises
    NotSupported for a QEMU that cannot write such a file.
    """
    if not {"mapped-ram", "multifd"} <= guest.capabilities.keys():
        version = ".".join(map(str, guest.version))
        raise NotSupported(f"this QEMU ({version}) writes no mapped-ram files; 9.0 and later do")
    capabilities = {
        "mapped-ram": (True, "the format of the file"),
        "multifd": (True, "several channels, and direct I/O needs it"),
        **_EVENTS,
        **_off("x-ignore-shared", "the snapshot is to have all of the memory"),
        **_pause(pause),
    }
    parameters: dict[str, tuple[Value, str]] = {
        "multifd-channels": (channels, "as asked for"),
        "direct-io": (
            direct,
            "pages go past the page cache" if direct else "direct I/O is not to be had",
        ),
        "zero-page-detection": _zero_pages(sparse, contents),
        **_PLAIN_FAST,
    }
    return _changes(guest, capabilities, parameters)


def for_device_state(guest: GuestInfo, *, pause: bool) -> Changes:
    """For engine ``direct`` by ``migrate``: a sequential stream without the shared memory."""
    capabilities = {
        "x-ignore-shared": (True, "shared memory is written here, not by QEMU"),
        **_EVENTS,
        **_off("mapped-ram", "the device state comes as a sequential stream"),
        **_off("multifd", "the device state comes as a sequential stream"),
    }
    parameters = {**_PLAIN_FAST, **(_AT_ONCE if guest.running else {})}
    return _changes(guest, {**capabilities, **_pause(pause)}, parameters)


def no_changes() -> Changes:
    """For engine ``direct`` by ``xen-save-devices-state``, which heeds no setting."""
    return Changes({}, {}, {})


def writes_all(sparse: Sparse, contents: Contents | None) -> bool:
    """Whether QEMU is to write every page, zero or not: because that is asked for, or faster."""
    if sparse is not Sparse.AUTO or contents is None:
        return sparse is Sparse.DENSE
    in_pieces = contents.data / _DISK_RATE + contents.pieces * WRITE_SECONDS
    return contents.length / _DISK_RATE < in_pieces


def _zero_pages(sparse: Sparse, contents: Contents | None) -> tuple[Value, str]:
    if not writes_all(sparse, contents):
        return "legacy", (
            "one thread looks for zero pages, so that the others leave in order, joined"
        )
    if sparse is Sparse.DENSE or contents is None:
        return "none", "every page is to be written"
    return "none", (
        f"about {contents.pieces} stretches of data between zero pages: to write all "
        f"{contents.length >> 20} MiB is faster than so many writes"
    )


def _pause(pause: bool) -> dict[str, tuple[bool, str]]:
    why = "disks are snapshotted while the guest stands" if pause else "it would wait for somebody"
    return {"pause-before-switchover": (pause, why)}


def _off(name: str, why: str) -> dict[str, tuple[bool, str]]:
    return {name: (False, why)}


def _changes(
    guest: GuestInfo,
    capabilities: Mapping[str, tuple[bool, str]],
    parameters: Mapping[str, tuple[Value, str]],
) -> Changes:
    off = {name: (False, why) for name, why in _OFF.items()}
    touched = {n: guest.parameters[n] for n in _TOUCHED if n in guest.parameters}
    return Changes(
        _differing(guest.capabilities, {**off, **capabilities}),
        _differing(guest.parameters, parameters),
        touched,
    )


def _differing(
    now: Mapping[str, Any], wanted: Mapping[str, tuple[Value, str]]
) -> dict[str, Change]:
    """What has to change. A setting that this QEMU does not have is left out."""
    return {
        name: Change(now[name], value, why)
        for name, (value, why) in wanted.items()
        if name in now and now[name] != value
    }
