"""Whether a guest can be saved by ``precopy``, how long that pauses it, and when it is worth it."""

from __future__ import annotations

import os

from pyqmigrate.errors import NotSupported, PyqmigrateError, QemuError
from pyqmigrate.io.process_memory import ProcessMemory
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.engine import Engine, choose_engine
from pyqmigrate.vm.plan.live_option import LiveMethod, LiveOption, LiveRequest
from pyqmigrate.vm.plan.sampling import extent_bytes

__all__ = ["LARGE_GUEST", "pause_channels", "precopy_option", "why_precopy"]

LARGE_GUEST = 1 << 30
"""Bytes of memory from which a save of a running guest uses this method without being asked."""
_PAUSE_CHANNELS = 8  # at most; memory is not read faster by more
# Processor time that comparing takes: pages of a file are read in place, or by one copy; those of
# another process by process_vm_readv.
_SECONDS_PER_GIB = 0.11
_SECONDS_PER_PRIVATE_GIB = 0.18
_SECONDS = 0.01  # for the commands and the device state


def precopy_option(guest: GuestInfo, request: LiveRequest) -> LiveOption:
    """Return what is known of ``precopy`` for ``guest``."""
    reasons = []
    if request.base is not None:
        reasons.append("it writes a whole snapshot, not one relative to a base")
    if guest.target_page_bits is None:
        reasons.append(f"the page size of {guest.target} differs between machines")
    try:
        choose_engine(guest, engine=Engine.DIRECT)
    except (NotSupported, QemuError) as error:
        reasons.append(str(error))
    return LiveOption(
        LiveMethod.PRECOPY,
        tuple(reasons),
        _SECONDS + _compare_seconds(guest) / pause_channels(),
        "all memory is read in the pause, to find what has changed",
    )


def why_precopy(guest: GuestInfo) -> str | None:
    """Return why a save of ``guest`` by engine ``direct`` is live without being asked; None if not.

    The guest is running and goes on afterwards.
    """
    if guest.total_ram < LARGE_GUEST or _data(guest) < LARGE_GUEST:
        return None
    if not precopy_option(guest, LiveRequest()).possible:
        return None
    return "the guest is large, and most of its memory can be copied while it runs"


def pause_channels() -> int:
    """Return how many channels compare in the pause, when the processors have nothing else to do."""
    return min(len(os.sched_getaffinity(0)), _PAUSE_CHANNELS)


def _compare_seconds(guest: GuestInfo) -> float:
    private = sum(b.length for b in guest.blocks if isinstance(b.memory, ProcessMemory))
    shared = max(_data(guest) - private, 0)
    return (private * _SECONDS_PER_PRIVATE_GIB + shared * _SECONDS_PER_GIB) / (1 << 30)


def _data(guest: GuestInfo) -> int:
    """Return an upper bound of the bytes that have to be compared."""
    try:
        return extent_bytes(guest)
    except PyqmigrateError:  # no longer readable: the save itself reports it
        return guest.total_ram
