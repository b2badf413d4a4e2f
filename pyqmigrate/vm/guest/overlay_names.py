"""Name overlays after their disk and their purpose, also in long chains."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

__all__ = ["overlay_name"]

_NAME_MAX = 255  # bytes of a name, on Linux file systems
_END = ".qcow2"
_PART_MAX = 120  # bytes of each of the two parts


def overlay_name(chain: Sequence[str], purpose: str, exists: Callable[[str], bool]) -> str:
    """Return a new name ``DISK.PURPOSE.qcow2`` of at most 255 bytes.

    ``chain`` are the names of the disk's file and of its backing files, from the top down. DISK is
    the first of them that is not such an overlay itself: in a chain of ten overlays, all are named
    after the file at the bottom. A number is added if the name ``exists``.
    """
    front = f"{_cut(_origin(chain))}.{_cut(purpose)}"
    number = 1
    name = f"{front}{_END}"
    while exists(name):
        number += 1
        name = f"{front}.{number}{_END}"
    assert len(os.fsencode(name)) <= _NAME_MAX
    return name


def _origin(chain: Sequence[str]) -> str:
    """Return the lowest image such that all above it are overlays named after it."""
    origin = chain[0]
    for depth, name in enumerate(chain[1:], 1):
        front = f"{_cut(name)}."
        if all(above.startswith(front) and above.endswith(_END) for above in chain[:depth]):
            origin = name
    return origin


def _cut(name: str) -> str:
    return os.fsencode(name)[:_PART_MAX].decode("utf-8", "ignore")
