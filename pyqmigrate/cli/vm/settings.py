"""Print the QEMU settings that a save changes temporarily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqmigrate.vm.plan.settings import UsedSetting

__all__ = ["setting_lines"]


def setting_lines(settings: Mapping[str, UsedSetting]) -> Iterator[str]:
    """Generate a line for each setting, with its value during the save and the reason."""
    for name, used in settings.items():
        yield f"setting   {name}={_text(used.value)} during the save: {used.why}"


def _text(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
