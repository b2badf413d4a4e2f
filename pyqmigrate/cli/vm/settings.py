"""QEMU's settings that a save changes for its time, in lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqmigrate.vm.plan.settings import UsedSetting

__all__ = ["setting_lines"]


def setting_lines(settings: Mapping[str, UsedSetting]) -> Iterator[str]:
    """A line each, with what it is meanwhile and why."""
    for name, used in settings.items():
        yield f"setting   {name}={_spelled(used.value)} meanwhile: {used.why}"


def _spelled(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
