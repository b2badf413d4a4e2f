"""Sizes for people: ``1GiB``, ``512M``, ``1.5 GiB``."""

from __future__ import annotations

import argparse
import re

from pyqmigrate.errors import UsageError
from pyqmigrate.format.stream.mapped_ram import OFFSET_MAX
from pyqmigrate.format.uri import parse_size

__all__ = ["MIB", "read_range", "read_size", "show_rate", "show_size"]

MIB = 1 << 20

_UNITS = ((10, "KiB"), (20, "MiB"), (30, "GiB"))
# Compiled when first used: a restore waits for each import.
_BINARY = r"(?ia)([0-9.]+) ?([kmgtpe])i(?:b)?"


def read_size(text: str) -> int:
    """Return the bytes of a size, for argparse: as QEMU writes it (``512M``, ``0x1000``), or KiB, MiB,
    GiB.

    The limit is that of a file, 8 EiB.
    """
    found = re.fullmatch(_BINARY, text.strip())
    try:
        size = parse_size(found[1] + found[2] if found else text)
    except UsageError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write it as 512MiB, 1GiB, 4096 or 0x1000"
        ) from None
    if size > OFFSET_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is too large: the limit of a file is 8 EiB")
    return size


def read_range(text: str) -> tuple[int, int] | None:
    """Return the first byte and the end of FROM-TO or FROM+LENGTH, for argparse; None if it is neither."""
    for sign in "-+":
        start, found, end = text.partition(sign)
        if not found:
            continue
        try:
            first, second = read_size(start), read_size(end)
        except argparse.ArgumentTypeError:
            return None
        if sign == "+":
            second += first
        if second <= first:
            raise argparse.ArgumentTypeError(f"the range {text!r} is empty")
        return first, second
    return None


def show_size(size: int) -> str:
    """Return a size in the largest of B, KiB, MiB and GiB that gives 1 or more."""
    if size < 1024:
        return f"{size} B"
    *smaller, (largest_shift, largest) = _UNITS
    for shift, unit in smaller:
        value = round(size / (1 << shift), 1)
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{size / (1 << largest_shift):.1f} {largest}"


def show_rate(size: int, seconds: float) -> str:
    """Return the rate in MiB per second, an empty text if no time passed."""
    return f"{size / MIB / seconds:.0f}" if seconds > 0 else ""
