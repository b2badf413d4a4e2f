"""The live methods. Each is imported when a guest is saved by it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pyqmigrate.vm.outgoing.live_save import LiveSave
from pyqmigrate.vm.outgoing.migrate import Written
from pyqmigrate.vm.plan.live_option import LiveMethod

__all__ = ["save_by_method"]


async def save_by_method(live_save: LiveSave) -> Written:
    """Have the file written by the method of ``live_save``."""
    return await _method(live_save.live.method)(live_save)


def _method(method: LiveMethod) -> Callable[[LiveSave], Awaitable[Written]]:
    match method:
        case LiveMethod.CONVERGE:
            from pyqmigrate.vm.outgoing.converge import save_converge

            return save_converge
        case LiveMethod.BACKGROUND:
            from pyqmigrate.vm.outgoing.background import save_background

            return save_background
        case LiveMethod.PRECOPY:
            from pyqmigrate.vm.outgoing.precopy import save_precopy

            return save_precopy
        case LiveMethod.CHANGED:
            from pyqmigrate.vm.outgoing.changed import save_changed

            return save_changed
