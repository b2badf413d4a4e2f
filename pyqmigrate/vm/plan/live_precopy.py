"""Whether a guest can be saved by ``precopy``, how long that pauses it, and when it is worth it."""

from __future__ import annotations

from pyqmigrate.errors import NotSupported, PyqmigrateError, QemuError
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.engine import Engine, choose_engine
from pyqmigrate.vm.plan.live_option import LiveMethod, LiveOption, LiveRequest
from pyqmigrate.vm.plan.sampling import extent_bytes

__all__ = ["LARGE_GUEST", "precopy_option", "why_precopy"]

LARGE_GUEST = 1 << 30
"""Bytes of memory from which a save of a running guest uses this method without being asked."""
_SECONDS_PER_GIB = 0.08  # by two channels on two idle processors
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
        _SECONDS + _data(guest) / (1 << 30) * _SECONDS_PER_GIB,
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


def _data(guest: GuestInfo) -> int:
    """Return an upper bound of the bytes that have to be compared."""
    try:
        return extent_bytes(guest)
    except PyqmigrateError:  # no longer readable: the save itself reports it
        return guest.total_ram
