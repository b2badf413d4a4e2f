"""The table of README.md as a bar chart.

    python bench/readme_chart.py [FILE.svg]          (default: docs/pictures/speed.svg)

The numbers are those of the table, which was recorded in one run of ``make bench``.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

# Last, so that an installed pyqmigrate comes before a tree whose core is not compiled.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from pyqmigrate.format.svg import Svg, nice_step

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "speed.svg"

# What a row of the table is called here; a row with two numbers has two names.
NAMES = {
    "pyqmigrate, memory as": ("pyqmigrate, memory as a file", "pyqmigrate, memory as a buffer"),
    "pyqmigrate vm save": ("pyqmigrate vm save, engine direct", "pyqmigrate vm save, engine qemu"),
    "QEMU, mapped-ram": ("QEMU with direct I/O, its defaults",),
    "QEMU, the best": ("QEMU, the best of its settings",),
    "libvirt": ("libvirt, parallel, no page cache",),
    "fio": ("fio, 1 MiB direct writes",),
}
OURS = "pyqmigrate"

_WIDTH, _LEFT, _RIGHT = 960, 250, 60
_HEAD, _PANEL_HEAD, _ROW, _BAR, _FOOT = 66, 34, 19, 13, 34
_TICKS = 8


@dataclass(frozen=True)
class Bar:
    """How long a contender took, in seconds."""

    name: str
    seconds: float


def read_table(page: str) -> dict[str, list[Bar]]:
    """Return the bars of each column of the table, by its heading.

    Raises ValueError for a row without a name.
    """
    found = re.search(r"^\| seconds \|.*?(?=\n\n)", page, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError("README.md has no table of seconds")
    head, _, *rows = [
        [cell.strip().replace("**", "") for cell in line.strip("| ").split("|")]
        for line in found[0].splitlines()
    ]
    bars: dict[str, list[Bar]] = {title: [] for title in head[1:]}
    for label, *cells in rows:
        names = next((names for start, names in NAMES.items() if label.startswith(start)), None)
        if names is None:
            raise ValueError(f"the row {label!r} has no name in bench/readme_chart.py")
        for title, cell in zip(head[1:], cells, strict=False):
            numbers = [float(number) for number in cell.split("/") if number.strip()]
            bars[title] += [Bar(*bar) for bar in zip(names, numbers, strict=False)]
    return bars


def draw(tables: dict[str, list[Bar]]) -> bytes:
    """Return the chart as an SVG."""
    longest = max(bar.seconds for bars in tables.values() for bar in bars)
    height = _HEAD + sum(_PANEL_HEAD + _ROW * len(bars) for bars in tables.values()) + _FOOT
    svg = Svg(_WIDTH, height, "Seconds to save 4 GiB of guest RAM, to the fsync")
    svg.text(20, 30, "Seconds to save 4 GiB of guest RAM, to the fsync", size=17, bold=True)
    svg.text(20, 50, "medians of one run, interleaved; shorter is better", "muted")
    step = nice_step(longest, _TICKS)
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    end = height - _FOOT + 6
    number = 0
    while number * step <= longest:
        x = _LEFT + number * step * scale
        svg.line([(x, _HEAD + 8), (x, end)], "grid")
        svg.text(x, end + 16, f"{number * step:g} s", "muted", size=11, anchor="middle")
        number += 1
    y: float = _HEAD
    for title, bars in tables.items():
        svg.text(20, y + 22, title, bold=True)
        y += _PANEL_HEAD
        for bar in bars:
            ours = bar.name.startswith(OURS)
            svg.text(_LEFT - 10, y + 12, bar.name, "ink" if ours else "muted", anchor="end")
            width, shown = bar.seconds * scale, f"{bar.seconds:.1f}"
            colour = "blue" if ours else "grey"
            svg.rectangle(_LEFT, y + 2, width, _BAR, colour, radius=2, tip=f"{bar.name}: {shown} s")
            svg.text(_LEFT + width + 6, y + 12, shown, "ink" if ours else "muted", bold=ours)
            y += _ROW
    return svg.encode()


def main() -> None:
    picture = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    picture.write_bytes(draw(read_table((ROOT / "README.md").read_text())))


if __name__ == "__main__":
    main()
