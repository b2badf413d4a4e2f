"""``/proc/PID/maps``: the mappings of a process, a line each, in the order of their addresses."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["map_lines", "read_maps"]


def read_maps(pid: int) -> list[str]:
    """Return the lines of a process's mappings; none of one that has ended. Raises OSError."""
    return map_lines(os.fsdecode(Path(f"/proc/{pid}/maps").read_bytes()))


def map_lines(text: str) -> list[str]:
    """Return the lines of such a file. A name in them may contain all that splitlines() splits at."""
    return [line for line in text.split("\n") if line]
