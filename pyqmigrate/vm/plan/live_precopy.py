"""Whether a guest can be saved by ``precopy``, and how long that pauses it."""

from __future__ import annotations

from pyqmigrate.errors import NotSupported, QemuError
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.engine import Engine, choose_engine
from pyqmigrate.vm.plan.live_option import LiveMethod, LiveOption, LiveRequest

__all__ = ["precopy_option"]

_SECONDS_PER_GIB = 0.08


def precopy_option(guest: GuestInfo, request: LiveRequest) -> LiveOption:
    """Return what is known of ``precopy`` for ``guest``."""
    reasons = []
    if request.base is not None:
        reasons.append("it writes a whole snapshot, not one relative to a base")
    try:
        choose_engine(guest, engine=Engine.DIRECT)
    except (NotSupported, QemuError) as error:
        reasons.append(str(error))
    return LiveOption(
        LiveMethod.PRECOPY,
        tuple(reasons),
        0.01 + guest.total_ram / (1 << 30) * _SECONDS_PER_GIB,
        "all memory is read in the pause, to find what has changed",
    )
