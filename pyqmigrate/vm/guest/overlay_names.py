"""How overlays are named: after their disk and what they are for, however many there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

__all__ = ["overlay_name"]

_NAME_MAX = 255  # bytes of a name, on Linux file systems
_END = ".qcow2"
_SHARE = 120  # bytes that each of the two names may take


def overlay_name(chain: Sequence[str], purpose: str, exists: Callable[[str], bool]) -> str:
    """A new name ``DISK.PURPOSE.qcow2`` of at most 255 bytes.

    ``chain`` are the names of the disk's file and of its backing files, from the top down. DISK is
    the first of them that was not named so itself; with ten overlays one over another, all are
    named after the file at the bottom. ``exists`` says which names are taken: then a number is
    added.
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
    """The lowest image down to which each one is an overlay named after it."""
    origin = chain[0]
    for depth, name in enumerate(chain[1:], 1):
        front = f"{_cut(name)}."
        if all(above.startswith(front) and above.endswith(_END) for above in chain[:depth]):
            origin = name
    return origin


def _cut(name: str) -> str:
    return os.fsencode(name)[:_SHARE].decode("utf-8", "ignore")
