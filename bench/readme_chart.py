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

OURS = "pyqmigrate"

_WIDTH, _LEFT, _RIGHT = 960, 300, 60
_HEAD, _PANEL_HEAD, _ROW, _BAR, _FOOT = 66, 34, 19, 13, 34
_TICKS = 8


@dataclass(frozen=True)
class Bar:
    """How long a contender took, in seconds: the median, the fastest and the slowest run."""

    name: str
    seconds: float
    least: float
    most: float


def read_table(page: str) -> dict[str, list[Bar]]:
    """Return the bars of each column of the table, by its heading."""
    found = re.search(r"^\| seconds .*?(?=\n\n|\n<)", page, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError("README.md has no table of seconds")
    head, _, *rows = [
        [cell.strip().replace("**", "") for cell in line.strip("| ").split("|")]
        for line in found[0].splitlines()
    ]
    bars: dict[str, list[Bar]] = {title: [] for title in head[1:]}
    for label, *cells in rows:
        for title, cell in zip(head[1:], cells, strict=False):
            if numbers := [float(number) for number in re.findall(r"[\d.]+", cell)]:
                bars[title].append(
                    Bar(label, numbers[0], numbers[-2 if numbers[1:] else 0], numbers[-1])
                )
    return bars


def draw(tables: dict[str, list[Bar]], size: str) -> bytes:
    """Return the chart as an SVG. ``size`` is that of the guest, with its unit."""
    title = f"Seconds to save {size} of guest RAM, to the fsync"
    longest = max(bar.most for bars in tables.values() for bar in bars)
    height = _HEAD + sum(_PANEL_HEAD + _ROW * len(bars) for bars in tables.values()) + _FOOT
    svg = Svg(_WIDTH, height, title)
    svg.text(20, 30, title, size=17, bold=True)
    svg.text(
        20,
        50,
        "medians of one run, interleaved, with the fastest and the slowest; shorter is better",
        "muted",
    )
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
    for heading, bars in tables.items():
        svg.text(20, y + 22, heading, bold=True)
        y += _PANEL_HEAD
        for bar in bars:
            ours = bar.name.startswith(OURS)
            svg.text(_LEFT - 10, y + 12, bar.name, "ink" if ours else "muted", anchor="end")
            shown, colour = f"{bar.seconds:.2f}", "blue" if ours else "grey"
            width = bar.seconds * scale
            svg.rectangle(_LEFT, y + 2, width, _BAR, colour, radius=2, tip=f"{bar.name}: {shown} s")
            least, most, middle = (
                _LEFT + bar.least * scale,
                _LEFT + bar.most * scale,
                y + 2 + _BAR / 2,
            )
            if bar.most > bar.least:
                svg.line([(least, middle), (most, middle)], "ink")
                for x in (least, most):
                    svg.line([(x, middle - 3), (x, middle + 3)], "ink")
            svg.text(most + 6, y + 12, shown, "ink" if ours else "muted", bold=ours)
            y += _ROW
    return svg.encode()


def main() -> None:
    picture = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    page = (ROOT / "README.md").read_text()
    size = re.search(r"([\d.]+ [MG]iB) of guest RAM", page)
    if size is None:
        raise ValueError("README.md does not say how large the guest is")
    picture.write_bytes(draw(read_table(page), size[1]))


if __name__ == "__main__":
    main()
