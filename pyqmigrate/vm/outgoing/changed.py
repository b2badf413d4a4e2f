"""The live method ``changed``: only the pages changed since the restore are copied, in the pause."""

from __future__ import annotations

from pyqmigrate.errors import NotSupported
from pyqmigrate.vm.outgoing.live_save import LiveSave
from pyqmigrate.vm.outgoing.migrate import Written

__all__ = ["save_changed"]


async def save_changed(save: LiveSave) -> Written:
    """Write the snapshot, and leave the guest running or paused as ``save.resume`` says."""
    raise NotSupported("the live method changed is not available")
