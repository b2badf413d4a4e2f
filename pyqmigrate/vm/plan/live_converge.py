"""Whether a guest can be saved by ``converge``, and how long that pauses it."""

from __future__ import annotations

from pyqmigrate.errors import NotSupported, QemuError
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.engine import Engine, choose_engine
from pyqmigrate.vm.plan.live_option import LiveMethod, LiveOption, LiveRequest, disks_pause

__all__ = ["DEFAULT_PAUSE", "converge_option", "downtime_limit"]

# Seconds.
DEFAULT_PAUSE = 0.02
_LEAST_PAUSE = 0.004  # to stop the guest, to save its device state, and to resume it


def converge_option(guest: GuestInfo, request: LiveRequest) -> LiveOption:
    """Return what is known of ``converge`` for ``guest``."""
    reasons = []
    if request.base is not None or request.keep_digests:
        reasons.append("QEMU writes the file: it knows no base and keeps no digests")
    try:
        choose_engine(guest, engine=Engine.QEMU)
    except (NotSupported, QemuError) as error:
        reasons.append(str(error))
    pause = DEFAULT_PAUSE
    if request.max_pause is not None:
        pause = request.max_pause - disks_pause(guest, request.with_disks)
        if pause < _LEAST_PAUSE:
            others = "" if pause == request.max_pause else " besides snapshots of the disks"
            reasons.append(
                f"to stop the guest and to save its devices takes about {_LEAST_PAUSE * 1e3:g} "
                f"ms{others}, and {request.max_pause * 1e3:g} ms are allowed"
            )
    return LiveOption(
        LiveMethod.CONVERGE,
        tuple(reasons),
        pause,
        "QEMU stops the guest once it expects to write the rest within this time",
    )


def downtime_limit(max_pause: float) -> int:
    """Return QEMU's ``downtime-limit``, in ms, for a pause of at most ``max_pause`` seconds.

    QEMU counts only the time to write the pages that are left, at the rate that it measured last.
    """
    return max(round(max_pause * 750) - 1, 1)
