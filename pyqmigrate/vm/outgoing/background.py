"""The live method ``background``: QEMU writes the guest's memory as it was at the start."""

from __future__ import annotations

from pyqmigrate.errors import NotSupported
from pyqmigrate.vm.outgoing.live_save import LiveSave
from pyqmigrate.vm.outgoing.migrate import Written

__all__ = ["save_background"]


async def save_background(save: LiveSave) -> Written:
    """Write the snapshot, and leave the guest running or paused as ``save.resume`` says."""
    raise NotSupported("the live method background is not available")
