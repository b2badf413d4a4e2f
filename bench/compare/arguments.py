"""The arguments of this program, and the parts of its work that they select."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path

from bench.compare.live import ROWS
from bench.results import GIB, MIB
from tests.harness.contents import Contents

__all__ = ["PARTS", "parse_arguments"]

_ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "scan",
    "saves",
    "cpu",
    "loads",
    "sparse",
    "seals",
    "memfd",
    "restores",
    "pool",
    "lazy",
    "live",
    "store",
    "filesystems",
    "channels",
    "growth",
)


def _byte_size(text: str) -> int:
    """``4GiB``, ``512MiB``; whole MiB."""
    match = re.fullmatch(r"(\d+)\s*(MiB|GiB)", text)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MiB or 4GiB")
    return int(match[1]) * (GIB if match[2] == "GiB" else MIB)


def _part_list(text: str, known: Collection[str] = PARTS) -> list[str]:
    parts = text.split(",")
    if unknown := [part for part in parts if part not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return parts


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it is at least 1")
    return number


def parse_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python bench/compare", description=description)
    parser.add_argument(
        "--dir",
        type=Path,
        default=_ROOT / "build" / "bench",
        help="directory on a disk to measure in (default: build/bench)",
    )
    parser.add_argument("--size", type=_byte_size, default=4 * GIB, help="guest memory (4GiB)")
    parser.add_argument("--repeat", type=_positive, default=3, help="runs of each contender (3)")
    parser.add_argument(
        "--slow-repeat",
        type=_positive,
        default=1,
        help="runs of who takes over 10 s and four times the fastest (1)",
    )
    parser.add_argument("--channels", type=_positive, default=2, help="channels and jobs (2)")
    parser.add_argument(
        "--only",
        type=_part_list,
        default=list(PARTS),
        metavar="PARTS",
        help=f"a list with commas out of {','.join(PARTS)}",
    )
    parser.add_argument(
        "--live",
        type=partial(_part_list, known=ROWS),
        default=list(ROWS),
        metavar="ROWS",
        help=f"of the part live: a list with commas out of {','.join(ROWS)}",
    )
    parser.add_argument(
        "--contents",
        type=partial(_part_list, known=[*Contents]),
        default=[*Contents],
        metavar="CONTENTS",
        help=f"of the parts saves, cpu and loads: a list with commas out of {','.join(Contents)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times there")
    parser.add_argument(
        "--growth-plot", type=Path, metavar="FILE.svg", help="draw the part growth there"
    )
    return parser.parse_args()
