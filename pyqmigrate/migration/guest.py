"""The interface through which a migration uses the guest of an embedding program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pyqmigrate.format.device.sections import DeviceSection

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Guest"]


class Guest:
    """A guest whose memory does not change and that has no devices. Override methods as needed.

    The methods are called from the migration's thread, or from the one that calls stop and cont
    of the Migration; never two at once. An exception fails the migration.
    """

    def stop(self) -> None:
        """Stop the processors: after the return, memory and devices do not change."""

    def cont(self) -> None:
        """Start the processors."""

    def dirty(self) -> Mapping[str, Buffer] | None:
        """Return the pages that changed since the last call, and reset them.

        The result is a bitmap for each block, bit ``k % 8`` of byte ``k // 8`` for page ``k``; an
        absent block did not change. Called before each pass, and once more after ``stop``. None (the
        default): changes are not tracked, so the guest is stopped before its memory is saved.
        """
        return None

    def save_devices(self) -> Sequence[DeviceSection]:
        """Return the devices' state, in the order of loading. Called while the guest is stopped."""
        return ()

    def load_devices(self, devices: Sequence[DeviceSection]) -> None:
        """Load the devices' state from a stream, in its order; it may contain unknown devices."""
