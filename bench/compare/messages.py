"""What this program says while it measures."""

from __future__ import annotations

import sys

__all__ = ["say"]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
