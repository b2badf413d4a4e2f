"""Events of a guest and its migrations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Event"]


class Event(NamedTuple):
    """Something that happened; ``data`` is None when there is nothing to say about it.

    ``time`` is in seconds since the epoch, when it happened.
    """

    name: str
    data: Mapping[str, object] | None
    time: float
