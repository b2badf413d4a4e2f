"""Whether a guest can be saved by ``converge``, and how long that pauses it."""

from __future__ import annotations

from pyqmigrate.errors import NotSupported, QemuError
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.engine import Engine, choose_engine
from pyqmigrate.vm.plan.live_option import LiveMethod, LiveOption, LiveRequest

__all__ = ["DEFAULT_PAUSE", "converge_option"]

DEFAULT_PAUSE = 0.02  # seconds


def converge_option(guest: GuestInfo, request: LiveRequest) -> LiveOption:
    """Return what is known of ``converge`` for ``guest``."""
    reasons = []
    if request.base is not None or request.keep_digests:
        reasons.append("QEMU writes the file: it knows no base and keeps no digests")
    try:
        choose_engine(guest, engine=Engine.QEMU)
    except (NotSupported, QemuError) as error:
        reasons.append(str(error))
    pause = DEFAULT_PAUSE if request.max_pause is None else request.max_pause
    return LiveOption(
        LiveMethod.CONVERGE,
        tuple(reasons),
        pause,
        "QEMU stops the guest once it expects to write the rest within this time",
    )
