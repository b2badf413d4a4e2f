"""The chart of a bench as an SVG: MiB/s over channels, from the slowest to the fastest run of each setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyqmigrate.cli.outcome import counted
from pyqmigrate.cli.sizes import MIB
from pyqmigrate.format.svg import Svg, nice_step, text_width

__all__ = ["chart"]

_WIDTH, _HEIGHT = 960, 400
_PANEL, _LEFT, _GAP = 400, 84, 56
_TOP, _BOTTOM = 96, 318  # of the plots
_TICKS = 6
_CAP = 5  # half the width of the ends of a range
_APART = 7  # of the two kinds of I/O, at the same number of channels, in pixels
_SERIES = ((True, "direct", "blue"), (False, "buffered", "yellow"))
_TITLES = {"save": "save, to the fsync", "load": "load, cold cache"}


def chart(
    results: Sequence[dict[str, Any]], data_bytes: int, title: str, conclusions: dict[str, str]
) -> bytes:
    """Return an SVG of the ``results`` of a bench, each of ``data_bytes``; ``conclusions`` has a
    sentence for ``save`` and one for ``load``."""
    svg = Svg(_WIDTH, _HEIGHT, f"pyqmigrate bench: {title}", "; ".join(conclusions.values()))
    svg.text(20, 30, title, size=17, bold=True)
    svg.text(20, 50, "MiB/s of data: medians, with ranges from slowest to fastest run", "muted")
    shown = [s for s in _SERIES if any(r["direct_io"] is s[0] for r in results)]
    x: float = _WIDTH - 20
    for _, name, colour in reversed(shown):
        x -= text_width(name)
        svg.text(x, 30, name, "muted")
        svg.rectangle(x - 18, 21, 12, 10, colour, radius=2)
        x -= 34
    fastest = max(max(_rates(r, work, data_bytes)) for r in results for work in _TITLES)
    step = nice_step(fastest, _TICKS)
    top = step * -(-fastest // step)
    for number, work in enumerate(_TITLES):
        left = _LEFT + number * (_PANEL + _GAP)
        _axes(svg, left, _TITLES[work], top, step, results)
        for index, (direct_io, name, colour) in enumerate(shown):
            aside = (index - (len(shown) - 1) / 2) * 2 * _APART
            points = [r for r in results if r["direct_io"] is direct_io]
            _series(svg, left, work, points, results, data_bytes, top, colour, name, aside)
        svg.text(left, _BOTTOM + 58, conclusions[work], size=11)
    return svg.encode()


def _rates(result: dict[str, Any], work: str, data_bytes: int) -> list[float]:
    """Return the rate of each run, in MiB/s."""
    return [data_bytes / seconds / MIB for seconds in result[f"{work}_runs"]]


def _axes(
    svg: Svg, left: float, title: str, top: float, step: float, results: Sequence[dict[str, Any]]
) -> None:
    svg.text(left, _TOP - 18, title, bold=True)
    for number in range(round(top / step) + 1):
        y = _y(number * step, top)
        svg.line([(left, y), (left + _PANEL, y)], "grid")
        svg.text(left - 8, y + 4, f"{number * step:,.0f}", "muted", size=11, anchor="end")
    for channels in _channels(results):
        x = left + _x(channels, results)
        svg.text(x, _BOTTOM + 18, str(channels), "muted", size=11, anchor="middle")
    svg.text(left + _PANEL / 2, _BOTTOM + 36, "channels", "muted", size=11, anchor="middle")


def _series(
    svg: Svg,
    left: float,
    work: str,
    points: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    data_bytes: int,
    top: float,
    colour: str,
    name: str,
    aside: float,
) -> None:
    places = [
        (left + _x(r["channels"], results) + aside, _y(r[f"{work}_rate"] / MIB, top))
        for r in points
    ]
    if len(places) > 1:
        svg.line(places, colour, width=2)
    for (x, y), result in zip(places, points, strict=True):
        rates = _rates(result, work, data_bytes)
        low, high = _y(min(rates), top), _y(max(rates), top)
        svg.line([(x, low), (x, high)], colour, width=2)
        for end in (low, high):
            svg.line([(x - _CAP, end), (x + _CAP, end)], colour, width=2)
        tip = (
            f"{counted(result['channels'], 'channel')}, {name}: {result[f'{work}_rate'] / MIB:,.0f} MiB/s, "
            f"{min(rates):,.0f} to {max(rates):,.0f}"
        )
        svg.circle(x, y, 5, colour, tip=tip)


def _channels(results: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({result["channels"] for result in results})


def _x(channels: int, results: Sequence[dict[str, Any]]) -> float:
    """Return where a number of channels is: all are equally far apart."""
    known = _channels(results)
    return _PANEL * (known.index(channels) + 0.5) / len(known)


def _y(rate: float, top: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * rate / top
