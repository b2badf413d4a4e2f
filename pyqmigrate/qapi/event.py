"""Events of a guest and its migrations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Event"]


class Event(NamedTuple):
    """An event; ``data`` is None if it has none.

    ``time`` is in seconds since the epoch.
    """

    name: str
    data: Mapping[str, object] | None
    time: float
