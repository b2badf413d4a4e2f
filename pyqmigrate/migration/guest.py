"""The guest, as a migration needs it; the embedding program says how each thing is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pyqmigrate.format.device.sections import DeviceSection

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Guest"]


class Guest:
    """A guest whose memory does not change and that has no devices. Override what differs.

    The methods are called from the migration's thread, or from the one that calls stop and cont
    of the Migration; never two at once. What they raise fails the migration.
    """

    def stop(self) -> None:
        """Stop the processors: when this returns, memory and devices stand still."""

    def cont(self) -> None:
        """Let the processors run."""

    def dirty(self) -> Mapping[str, Buffer] | None:
        """Which pages changed since the last call: a bitmap for each block, bit ``k % 8`` of byte
        ``k // 8`` for page ``k``; a block that is not in it did not change.

        Called before each pass, and once more after ``stop``. What it tells is
        forgotten by the guest. None (the default): changes are not tracked, so the guest is
        stopped before its memory is saved.
        """
        return None

    def save_devices(self) -> Sequence[DeviceSection]:
        """The devices' state, in the order in which they are to be loaded. Called while stopped."""
        return ()

    def load_devices(self, devices: Sequence[DeviceSection]) -> None:
        """Take the devices' state from a stream, in its order; unknown ones are there too."""
