"""Columns of little-endian numbers: arrays that are written and read whole."""

from __future__ import annotations

import sys
from array import array
from typing import TypeAlias

from pyqmigrate.format.digest import Data

__all__ = ["Numbers", "from_bytes", "to_bytes"]

Numbers: TypeAlias = "array[int]"  # of "H", "I" or "Q"


def to_bytes(numbers: Numbers) -> bytes:
    """Return the numbers, little-endian."""
    return _turned(numbers).tobytes()


def from_bytes(code: str, data: Data) -> Numbers:
    """Return the numbers of type ``code`` in ``data``, whose length fits."""
    numbers: Numbers = array(code)
    numbers.frombytes(data)
    return _turned(numbers)


def _turned(numbers: Numbers) -> Numbers:
    if sys.byteorder == "little":
        return numbers
    turned = numbers[:]
    turned.byteswap()
    return turned
