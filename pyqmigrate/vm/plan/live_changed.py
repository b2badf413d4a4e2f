"""Whether a guest can be saved by ``changed``, and how long that pauses it."""

from __future__ import annotations

import time

from pyqmigrate.errors import NotSupported, PyqmigrateError, QemuError
from pyqmigrate.vm.guest.guest_base import GuestBase
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.blockers import DeviceStateMethod, missed_devices
from pyqmigrate.vm.plan.engine import Engine, choose_engine
from pyqmigrate.vm.plan.live_option import LiveMethod, LiveOption, LiveRequest

__all__ = ["changed_option", "expected_pause"]

_COPY_RATE = 2.5 * (1 << 30)  # bytes a second, by two channels
_DIGEST_SECONDS_PER_GIB = 0.08
_SCAN_SECONDS_PER_GIB = 0.007  # of pages in memory
_STOP = 0.004  # seconds, to stop the guest, get its device state and resume it
_CHANNELS = 2


def changed_option(guest: GuestInfo, request: LiveRequest) -> LiveOption:
    """Return what is known of ``changed`` for ``guest``. Blocks while memory is looked at."""
    reasons = missed_devices(guest, DeviceStateMethod.DEVICES_ONLY)
    if request.keep_digests:
        reasons.append("it does not read the pages that did not change, so it keeps no digests")
    try:
        choose_engine(guest, engine=Engine.DIRECT)
    except (NotSupported, QemuError) as error:
        reasons.append(str(error))
    pause, basis = None, ""
    if not reasons:
        try:
            with GuestBase.find(guest, request.base) as base:
                pause, basis = _estimate(base)
        except PyqmigrateError as error:
            reasons.append(str(error))
    return LiveOption(LiveMethod.CHANGED, tuple(reasons), pause, basis)


def expected_pause(copied: int, *, scan: float = 0.0, compared: int = 0) -> float:
    """Return the expected pause in seconds if ``copied`` bytes are copied.

    ``scan`` is how long it takes to find them, in seconds; ``compared`` are the bytes whose digests are
    computed to find them.
    """
    return _STOP + scan + copied / _COPY_RATE + compared / (1 << 30) * _DIGEST_SECONDS_PER_GIB


def _estimate(base: GuestBase) -> tuple[float, str]:
    whole = sum(block.length for block in base.whole)
    if base.ram is None:
        compared = sum(block.length for block in base.blocks.values()) - whole
        pause = expected_pause(whole, compared=compared)
        return pause, "all memory is compared with digests in the pause"
    started = time.monotonic()
    changed = base.ram.find_changed(channels=_CHANNELS)
    try:
        scan = time.monotonic() - started
        copied = sum(pages.nbytes for pages in changed.values())
    finally:
        for pages in changed.values():
            pages.close()
    mapped = sum(block.length for block in base.ram.blocks)
    scan = min(scan, mapped / (1 << 30) * _SCAN_SECONDS_PER_GIB)
    return (
        expected_pause(copied + whole, scan=scan),
        f"{copied >> 20} MiB have changed since the restore, and are copied in the pause",
    )
