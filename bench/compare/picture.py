"""The times as a picture: one panel a work, one bar a contender."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from bench.results import FIO, LIBVIRT, OURS, QEMU, Results

__all__ = ["draw"]

_COLOURS = {OURS: "#1f6f8b", QEMU: "#c8693c", FIO: "#8a8a8a", LIBVIRT: "#6b5b95"}
_NEAR = 5.0  # how many times the fastest still fits on the axis


def draw(results: Results, title: str, path: Path) -> bool:
    """Writes a PNG of all saves and loads of a content; False when there are none.

    Bars are medians, whiskers the fastest and the slowest run. Bars that would leave the others
    no room are cut, and all say their number.
    """
    works = [
        work
        for verb in ("save", "load")
        for work in results.samples
        if work.startswith(verb) and work != "save sparse"
    ]
    if not works:
        return False
    heights = [len(results.samples[work]) + 1.5 for work in works]
    figure, panels = plt.subplots(
        len(works),
        1,
        squeeze=False,
        figsize=(9, 0.3 * sum(heights) + 0.8),
        height_ratios=heights,
        layout="constrained",
    )
    for work, panel in zip(works, panels[:, 0], strict=True):
        _panel(results, work, panel)
    figure.suptitle(title, fontsize=10)
    figure.legend(
        handles=[Patch(color=colour, label=side) for side, colour in _COLOURS.items()],
        loc="outside lower center",
        ncols=len(_COLOURS),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _panel(results: Results, work: str, panel: Axes) -> None:
    bars = list(results.samples[work])
    medians = [results.median(work, side, name) for side, name in bars]
    edge = _NEAR * min(medians)
    for place, ((side, name), median) in enumerate(zip(bars, medians, strict=True)):
        seconds = [sample.seconds for sample in results.of(work, side, name)]
        panel.barh(place, min(median, edge), color=_COLOURS[side], height=0.7)
        end = min(median, edge)
        if max(seconds) < edge:
            end = max(seconds)
            panel.plot([min(seconds), max(seconds)], [place, place], color="black", linewidth=1)
        text = f"{median:.2f} s" + (" (cut)" if median > edge else "")
        panel.text(end + edge * 0.01, place, text, va="center", fontsize=7)
    panel.set_yticks(range(len(bars)), [name for _, name in bars], fontsize=7)
    panel.margins(y=0.02)
    panel.invert_yaxis()
    panel.set_xlim(0, min(edge, max(medians)) * 1.15)
    panel.set_title(f"{work}, seconds", fontsize=9, loc="left")
    panel.tick_params(axis="x", labelsize=7)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
