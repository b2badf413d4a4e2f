"""The picture of a save: what happened when, in a lane for the guest, QEMU, each channel and the file.

Below the whole save, a pause that is short beside it is shown again, magnified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyqmigrate.format.svg import Svg, nice_step, text_width
from pyqmigrate.vm.outgoing.timeline import Lane, Phase

__all__ = ["picture"]

_WIDTH, _MARGIN = 960, 20
_LEFT, _RIGHT = 96, 24  # of the lanes
_HEAD = 62  # title and subtitle
_PANEL_HEAD, _PANEL_FOOT = 44, 36
_ROW, _BAR = 30, 20
_TICKS = 10
_LEAST = 2.0  # pixels of the shortest phase
_AROUND = 6  # pixels around a text
_SHORT = 0.2  # of the save: a shorter pause is magnified
_BEFORE_AND_AFTER = 0.25  # of the pause, beside it in its own panel

_ORDER = (Lane.GUEST, Lane.QEMU, Lane.PAGES)  # channels follow, then the file
_NAMES: dict[str, str] = {Lane.QEMU: "QEMU"}
_COLOURS: dict[str, str] = {Lane.GUEST: "pale-grey", Lane.QEMU: "yellow", Lane.FILE: "aqua"}
_DARK, _LIGHT = "#0b0b0b", "#ffffff"


@dataclass(frozen=True)
class _Panel:
    """A part of the save, from ``start`` to ``end``, in seconds; ``rows`` of phases by lane."""

    name: str
    start: float
    end: float
    lanes: tuple[tuple[str, list[list[Phase]]], ...]

    @property
    def height(self) -> float:
        return _PANEL_HEAD + _ROW * sum(len(rows) for _, rows in self.lanes) + _PANEL_FOOT

    def x(self, time: float) -> float:
        """Return where a time is, in pixels."""
        share = (time - self.start) / (self.end - self.start)
        return _LEFT + min(max(share, 0.0), 1.0) * (_WIDTH - _LEFT - _RIGHT)


def picture(phases: Sequence[Phase], title: str, subtitle: str) -> bytes:
    """Return an SVG of the phases of a save (:attr:`~pyqmigrate.vm.VmSaveReport.timeline`)."""
    panels = _panels(phases)
    height = _HEAD + sum(panel.height for panel in panels)
    pauses = _pauses(phases)
    svg = Svg(_WIDTH, height, f"Timeline: {title}", subtitle)
    svg.text(_MARGIN, 30, title, size=17, bold=True)
    svg.text(_MARGIN, 50, subtitle, "muted")
    top: float = _HEAD
    for panel in panels:
        _draw_panel(svg, top, panel, pauses)
        top += panel.height
    return svg.encode()


def _panels(phases: Sequence[Phase]) -> list[_Panel]:
    end = max((phase.ends for phase in phases), default=0.0) or 1e-3
    panels = [_Panel("the save", 0.0, end, _lanes(phases))]
    longest = max(_pauses(phases), key=_length, default=None)
    if longest is not None and 0 < _length(longest) < _SHORT * end:
        around = _BEFORE_AND_AFTER * _length(longest)
        first, last = max(longest.begins - around, 0.0), min(longest.ends + around, end)
        shown = [phase for phase in phases if phase.begins < last and phase.ends > first]
        panels.append(_Panel("the pause", first, last, _lanes(shown)))
    return panels


def _pauses(phases: Sequence[Phase]) -> list[Phase]:
    """Return when a guest that ran was stopped."""
    guest = [phase for phase in phases if phase.lane == Lane.GUEST]
    if not any(phase.name == "runs" for phase in guest):
        return []
    return [phase for phase in guest if phase.name == "stopped"]


def _length(phase: Phase) -> float:
    return phase.ends - phase.begins


def _lanes(phases: Sequence[Phase]) -> tuple[tuple[str, list[list[Phase]]], ...]:
    """Return the lanes from top to bottom, each with rows of phases that do not overlap."""
    by_lane: dict[str, list[list[Phase]]] = {}
    for phase in sorted(phases, key=lambda phase: (phase.begins, -phase.ends)):
        rows = by_lane.setdefault(phase.lane, [])
        free = next((row for row in rows if row[-1].ends <= phase.begins), None)
        if free is None:
            rows.append([phase])
        else:
            free.append(phase)
    return tuple(sorted(by_lane.items(), key=lambda lane: _place(lane[0])))


def _place(lane: str) -> tuple[int, int]:
    if lane in _ORDER:
        return _ORDER.index(Lane(lane)), 0
    if lane == Lane.FILE:
        return len(_ORDER) + 1, 0
    return len(_ORDER), int(lane.rpartition(" ")[2])


def _draw_panel(svg: Svg, top: float, panel: _Panel, pauses: Sequence[Phase]) -> None:
    lanes_top = top + _PANEL_HEAD
    lanes_end = top + panel.height - _PANEL_FOOT
    svg.text(_MARGIN, top + 30, panel.name, "muted", bold=True)
    _draw_axis(svg, panel, lanes_top, lanes_end)
    y = lanes_top
    for lane, rows in panel.lanes:
        svg.text(_LEFT - 10, y + _ROW / 2 + 4, _NAMES.get(lane, lane), "muted", anchor="end")
        for row in rows:
            _draw_row(svg, panel, y + (_ROW - _BAR) / 2, row)
            y += _ROW
    free_from = 0.0
    for pause in pauses:
        if pause.begins < panel.end and pause.ends > panel.start:
            free_from = _draw_pause(svg, panel, pause, lanes_top, lanes_end, free_from)


def _draw_axis(svg: Svg, panel: _Panel, top: float, end: float) -> None:
    step = nice_step(panel.end - panel.start, _TICKS)
    number = -(-panel.start // step)  # the first tick in the panel
    while (time := number * step) <= panel.end:
        x = panel.x(time)
        svg.line([(x, top), (x, end)], "grid")
        svg.text(x, end + 16, _show(time, step), "muted", size=11, anchor="middle")
        number += 1
    svg.line([(_LEFT, end), (_WIDTH - _RIGHT, end)], "grid")


def _draw_row(svg: Svg, panel: _Panel, y: float, row: Sequence[Phase]) -> None:
    free_from: float = _LEFT  # of texts and bars
    for number, phase in enumerate(row):
        x, end = panel.x(phase.begins), panel.x(phase.ends)
        width = max(end - x - 1, _LEAST)  # neighbours do not touch
        following = panel.x(row[number + 1].begins) if number + 1 < len(row) else _WIDTH - _MARGIN
        colour, ink = _colours(phase)
        svg.rectangle(x, y, width, _BAR, colour, radius=min(3, width / 2), tip=_tip(phase))
        needed = text_width(phase.name, 11) + 2 * _AROUND
        if needed <= width:
            svg.text(x + _AROUND, y + 14, phase.name, ink, size=11)
        elif x + width + needed <= following:
            svg.text(x + width + _AROUND, y + 14, phase.name, "muted", size=11)
            width += needed
        elif x - needed >= free_from:
            svg.text(x - _AROUND, y + 14, phase.name, "muted", size=11, anchor="end")
        free_from = x + width


def _colours(phase: Phase) -> tuple[str, str]:
    """Return the colours of a phase and of a text in it."""
    if phase.lane == Lane.GUEST:
        return ("red", _LIGHT) if phase.name == "stopped" else ("pale-grey", "ink")
    if phase.lane in _COLOURS:
        return _COLOURS[phase.lane], _DARK
    return ("blue", _LIGHT) if phase.name.startswith("write") else ("pale-blue", "ink")


def _draw_pause(
    svg: Svg, panel: _Panel, pause: Phase, top: float, end: float, free_from: float
) -> float:
    """Mark the pause through all lanes, with its length above them if there is space from there on;
    return where the space begins then."""
    left, right = panel.x(pause.begins), panel.x(pause.ends)
    for x in {left, right}:
        svg.line([(x, top - 6), (x, end)], "red", dashed=True)
    text = f"paused {_precise(_length(pause))}"
    half = text_width(text, 12) / 2
    middle = min(max((left + right) / 2, _LEFT + half), _WIDTH - _MARGIN - half)
    if middle - half < free_from:
        return free_from
    svg.text(middle, top - 11, text, "red", bold=True, anchor="middle")
    return middle + half + _AROUND


def _tip(phase: Phase) -> str:
    pages = "" if phase.pages is None else f", {phase.pages:,} pages"
    return (
        f"{_NAMES.get(phase.lane, phase.lane)}: {phase.name}, {_precise(_length(phase))} "
        f"from {_precise(phase.begins)} on{pages}"
    )


def _show(time: float, step: float) -> str:
    """Return a time at a tick, with the digits that a step needs."""
    if step >= 0.5:
        return f"{time:g} s"
    return f"{time * 1e3:.{0 if step >= 1e-3 else 1}f} ms"


def _precise(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
