"""Whether a guest can be saved by ``background``, and how long that pauses it."""

from __future__ import annotations

from pyqmigrate.errors import NotSupported, QemuError
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.engine import Engine, choose_engine
from pyqmigrate.vm.plan.live_option import LiveMethod, LiveOption, LiveRequest

__all__ = ["background_option"]

_SECONDS_PER_GIB = 0.05  # to write-protect 4 KiB pages, and to end that


def background_option(guest: GuestInfo, request: LiveRequest) -> LiveOption:
    """Return what is known of ``background`` for ``guest``."""
    reasons = []
    if request.base is not None or request.keep_digests:
        reasons.append("QEMU writes the file: it knows no base and keeps no digests")
    if "background-snapshot" not in guest.capabilities:
        reasons.append("this QEMU has no background-snapshot")
    try:
        choose_engine(guest, engine=Engine.QEMU)
    except (NotSupported, QemuError) as error:
        reasons.append(str(error))
    return LiveOption(
        LiveMethod.BACKGROUND,
        tuple(reasons),
        0.01 + guest.total_ram / (1 << 30) * _SECONDS_PER_GIB,
        "QEMU write-protects all memory while the guest is stopped",
    )
