"""Choose QEMU's migration settings for a save.

The QEMU belongs to another owner, so a save changes only the capabilities and parameters that it
must, each with a reason to show. :mod:`pyqmigrate.vm.outgoing.transaction` restores all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pyqmigrate.errors import NotSupported
from pyqmigrate.snapshot.save.writer import Sparse
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.sampling import Sample

__all__ = [
    "WRITE_SECONDS",
    "Change",
    "Changes",
    "UsedSetting",
    "Value",
    "for_background",
    "for_device_state",
    "for_pages",
    "no_changes",
    "writes_all",
]

Value: TypeAlias = bool | int | str

# The cost of one more write besides its bytes, direct or (with the fsync) buffered, and the rate of
# a disk. Measured on a virtio disk.
WRITE_SECONDS = 40e-6
_DISK_RATE = 1.5e9  # bytes/s

# Capabilities that exclude a save to a file, or would harm the guest.
_OFF = {
    "xbzrle": "deltas of pages have no place in the file",
    "postcopy-ram": "it needs an answer from the destination",
    "postcopy-preempt": "it needs postcopy-ram",
    "postcopy-blocktime": "it is for postcopy-ram",
    "return-path": "a file sends no answer",
    "switchover-ack": "it needs return-path",
    "x-colo": "COLO needs a second guest, not a file",
    "release-ram": "it frees the guest's pages once they are sent",
    "background-snapshot": "it writes a file of another kind",
    "zero-copy-send": "it is for sockets",
    "compress": "compressed pages have no place in the file",
    "block": "disks are not saved this way",
}
# Capabilities that background-snapshot excludes (QEMU 10.0.2), besides those.
_FOREGROUND = (
    "multifd",
    "pause-before-switchover",
    "auto-converge",
    "dirty-bitmaps",
    "validate-uuid",
    "late-block-activate",
    "rdma-pin-all",
)
_EVENTS: Mapping[str, tuple[bool, str]] = {
    "events": (True, "QEMU reports the end of the migration at once")
}
_GENTLE: Mapping[str, tuple[bool, str]] = {
    "auto-converge": (False, "it would slow the guest down"),
    "dirty-limit": (False, "it would slow the guest down"),
}
_PLAIN_FAST: Mapping[str, tuple[Value, str]] = {
    "max-bandwidth": (0, "no limit"),
    "multifd-compression": ("none", "compressed pages have no place in the file"),
    "tls-creds": ("", "a file is not encrypted on the wire"),
    "mode": ("normal", "the others are for restarting a host"),
}
# At this rate, half a second of downtime moves more than any guest has: QEMU stops the guest when
# it first checks the rate (after 100 ms), and the snapshot still records that it was running.
_ANY_RATE = 1 << 50  # bytes/s
# Parameters that a live save, or cancelling one, may change later.
_TOUCHED = ("downtime-limit", "max-bandwidth")
_AT_ONCE: Mapping[str, tuple[Value, str]] = {
    "avail-switchover-bandwidth": (_ANY_RATE, "QEMU is to stop the guest at once"),
    "downtime-limit": (1000, "QEMU is to stop the guest at once"),
}


@dataclass(frozen=True)
class Change:
    """A setting to change: what it was, what it will be, and why."""

    before: Value
    after: Value
    why: str


@dataclass(frozen=True)
class UsedSetting:
    """A QEMU setting that a save changes temporarily: the value, and why."""

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
        """Return the settings during the save, by name."""
        both = {**self.capabilities, **self.parameters}
        return {name: UsedSetting(change.after, change.why) for name, change in both.items()}


def for_pages(
    guest: GuestInfo,
    *,
    channels: int,
    direct: bool,
    sparse: Sparse,
    pause: bool,
    sample: Sample | None,
    downtime_limit: int | None = None,
) -> Changes:
    """Return the changes for engine ``qemu``, where QEMU writes a mapped-ram file.

    ``direct``: direct I/O is possible; ``sample`` is an estimate of what the guest's memory holds;
    ``pause``: something is to be done while the guest is paused; ``downtime_limit``: the guest
    runs until the rest takes no longer than this many ms. Raises NotSupported for a QEMU that
    cannot write such a file.
    """
    if not {"mapped-ram", "multifd"} <= guest.capabilities.keys():
        version = ".".join(map(str, guest.version))
        raise NotSupported(
            f"this QEMU ({version}) cannot write mapped-ram files; 9.0 and later can"
        )
    capabilities = {
        "mapped-ram": (True, "the format of the file"),
        "multifd": (True, "several channels, and direct I/O needs it"),
        **_EVENTS,
        **_off("x-ignore-shared", "the snapshot must contain all memory"),
        **_pause(pause),
    }
    parameters: dict[str, tuple[Value, str]] = {
        "multifd-channels": (channels, "as requested"),
        "direct-io": (
            direct,
            "pages go past the page cache" if direct else "direct I/O is not available",
        ),
        "zero-page-detection": _zero_pages(sparse, sample),
        **_PLAIN_FAST,
    }
    if downtime_limit is not None:
        capabilities |= _GENTLE
        parameters["downtime-limit"] = (
            downtime_limit,
            "the guest is stopped when the rest can be written in so many ms",
        )
        parameters["avail-switchover-bandwidth"] = (0, "QEMU goes by the rate that it measures")
    return _changes(guest, capabilities, parameters)


def for_background(guest: GuestInfo, *, sparse: Sparse) -> Changes:
    """Return the changes for the live method ``background``. Raises NotSupported for a QEMU that
    cannot write such a file."""
    if not {"mapped-ram", "background-snapshot"} <= guest.capabilities.keys():
        raise NotSupported("this QEMU has no background-snapshot, or no mapped-ram")
    capabilities = {
        "mapped-ram": (True, "the format of the file"),
        "background-snapshot": (True, "each page is written before the guest changes it"),
        **_EVENTS,
        **_off("x-ignore-shared", "the snapshot must contain all memory"),
        **dict.fromkeys(_FOREGROUND, (False, "QEMU refuses it with background-snapshot")),
    }
    parameters: dict[str, tuple[Value, str]] = {
        "direct-io": (False, "pages are written one at a time, through the page cache"),
        "zero-page-detection": (
            ("none", "every page is written, as requested")
            if sparse is Sparse.DENSE
            else ("legacy", "zero pages are not written")
        ),
        **_PLAIN_FAST,
        "max-bandwidth": (0, "no limit: the guest waits for the pages that it changes"),
    }
    return _changes(guest, capabilities, parameters)


def for_device_state(guest: GuestInfo, *, pause: bool) -> Changes:
    """Return the changes for engine ``direct`` by ``migrate``: a stream without shared memory."""
    capabilities = {
        "x-ignore-shared": (True, "shared memory is written by this package, not by QEMU"),
        **_EVENTS,
        **_off("mapped-ram", "the device state comes as a sequential stream"),
        **_off("multifd", "the device state comes as a sequential stream"),
    }
    parameters = {**_PLAIN_FAST, **(_AT_ONCE if guest.running else {})}
    return _changes(guest, {**capabilities, **_pause(pause)}, parameters)


def no_changes() -> Changes:
    """Return none: for engine ``direct`` by ``xen-save-devices-state``, which uses no settings."""
    return Changes({}, {}, {})


def writes_all(sparse: Sparse, sample: Sample | None) -> bool:
    """Return whether QEMU is to write all pages, because that was requested or is faster."""
    if sparse is not Sparse.AUTO or sample is None:
        return sparse is Sparse.DENSE
    by_pieces = sample.data / _DISK_RATE + sample.pieces * WRITE_SECONDS
    return sample.length / _DISK_RATE < by_pieces


def _zero_pages(sparse: Sparse, sample: Sample | None) -> tuple[Value, str]:
    if not writes_all(sparse, sample):
        return "legacy", (
            "one thread looks for zero pages, so that data is written in order, in large pieces"
        )
    if sparse is Sparse.DENSE or sample is None:
        return "none", "every page is written, as requested"
    return "none", (
        f"about {sample.pieces} runs of data between zero pages: writing all "
        f"{sample.length >> 20} MiB is faster than that many writes"
    )


def _pause(pause: bool) -> dict[str, tuple[bool, str]]:
    why = (
        "disks are snapshotted while the guest is paused"
        if pause
        else "QEMU would wait for a command"
    )
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
    """Return the changes needed; settings that this QEMU lacks are left out."""
    return {
        name: Change(now[name], value, why)
        for name, (value, why) in wanted.items()
        if name in now and now[name] != value
    }
