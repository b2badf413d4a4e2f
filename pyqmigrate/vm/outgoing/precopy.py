"""The live method ``precopy``: pages are copied while the guest runs, and again in the pause if they changed."""

from __future__ import annotations

from pyqmigrate.errors import NotSupported
from pyqmigrate.vm.outgoing.live_save import LiveSave
from pyqmigrate.vm.outgoing.migrate import Written

__all__ = ["save_precopy"]


async def save_precopy(save: LiveSave) -> Written:
    """Write the snapshot, and leave the guest running or paused as ``save.resume`` says."""
    raise NotSupported("the live method precopy is not available")
