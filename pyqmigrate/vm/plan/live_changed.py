"""Whether a guest can be saved by ``changed``, and how long that pauses it."""

from __future__ import annotations

from pyqmigrate.errors import NotSupported, QemuError
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.engine import Engine, choose_engine
from pyqmigrate.vm.plan.live_option import LiveMethod, LiveOption, LiveRequest

__all__ = ["changed_option"]


def changed_option(guest: GuestInfo, request: LiveRequest) -> LiveOption:
    """Return what is known of ``changed`` for ``guest``. Blocks while memory is looked at."""
    reasons = ["pyqmigrate cannot yet save changed pages only"]
    try:
        choose_engine(guest, engine=Engine.DIRECT)
    except (NotSupported, QemuError) as error:
        reasons.append(str(error))
    return LiveOption(LiveMethod.CHANGED, tuple(reasons))
