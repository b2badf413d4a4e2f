"""The colours of a picture, and which one a cell has.

Entropy is a ramp that is even to the eye, also to a colour-blind one (the colours of matplotlib's viridis,
one for each bit); classes have hues that the ramp has not. Where pages are compared, all that did not
change is muted.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Kind", "Painter", "Rgb", "THEMES", "Theme", "ThemeName", "hex_of", "kind_of"]

Rgb: TypeAlias = tuple[int, int, int]


class ThemeName(enum.StrEnum):
    LIGHT = "light"
    DARK = "dark"


@dataclass(frozen=True)
class Theme:
    """``background`` and ``text`` of the picture, and the colours of classes. ``ramp`` is by entropy."""

    background: Rgb
    text: Rgb
    faint: Rgb
    hole: Rgb
    zero: Rgb
    filled: Rgb
    changed: Rgb
    touched: Rgb
    ramp: tuple[Rgb, ...]


def _rgb(text: str) -> Rgb:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


_RAMP = tuple(
    _rgb(text)
    for text in (
        "#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30",
        "#fde725",
    )
)  # fmt: skip
THEMES = {
    ThemeName.LIGHT: Theme(
        background=_rgb("#ffffff"),
        text=_rgb("#1c2430"),
        faint=_rgb("#6b7686"),
        hole=_rgb("#e6e9ef"),
        zero=_rgb("#c3cad6"),
        filled=_rgb("#58aef5"),
        changed=_rgb("#e0430b"),
        touched=_rgb("#d6369b"),
        ramp=_RAMP,
    ),
    ThemeName.DARK: Theme(
        background=_rgb("#10131a"),
        text=_rgb("#e6e9ef"),
        faint=_rgb("#8a94a6"),
        hole=_rgb("#262b36"),
        zero=_rgb("#454d5c"),
        filled=_rgb("#8ecbff"),
        changed=_rgb("#ff5c26"),
        touched=_rgb("#ff8ad8"),
        ramp=_RAMP,
    ),
}


class Kind(enum.Enum):
    """What a cell is shown as where there is one sign for it: the most remarkable of what it has."""

    NOTHING = enum.auto()
    HOLE = enum.auto()
    ZERO = enum.auto()
    FILLED = enum.auto()
    DATA = enum.auto()
    TOUCHED = enum.auto()
    CHANGED = enum.auto()


def kind_of(cell: bytes) -> Kind:
    """Return the kind of a cell, by its summary."""
    mapped, data, filled, zero, _, changed, touched, _ = cell
    if not mapped:
        return Kind.NOTHING
    if changed:
        return Kind.CHANGED
    if touched:
        return Kind.TOUCHED
    if data:
        return Kind.DATA
    if filled:
        return Kind.FILLED
    return Kind.ZERO if zero else Kind.HOLE


class Painter:
    """The colours of cells in a theme. ``compared``: whether changed or touched pages are looked for."""

    def __init__(self, theme: Theme, *, compared: bool) -> None:
        self.theme = theme
        self._compared = compared
        self._known: dict[bytes, Rgb | None] = {}

    def __call__(self, cell: bytes) -> Rgb | None:
        """Return the colour of a cell, by its summary; None if no memory is there."""
        if cell not in self._known:
            self._known[cell] = self._paint(cell)
        return self._known[cell]

    def by_entropy(self, entropy: float) -> Rgb:
        """Return the colour of data of 0 to 8 bits a byte."""
        ramp = self.theme.ramp
        place = min(max(entropy, 0.0), 8.0) / 8 * (len(ramp) - 1)
        low = min(int(place), len(ramp) - 2)
        return _mixed(ramp[low], ramp[low + 1], place - low)

    def _paint(self, cell: bytes) -> Rgb | None:
        mapped, data, filled, zero, entropy, changed, touched, _ = cell
        if not mapped:
            return None
        theme = self.theme
        # Square roots: a page of data among many holes can be seen.
        weights = [
            (self.by_entropy(entropy / 32), (data / 255) ** 0.5),
            (theme.filled, (filled / 255) ** 0.5),
            (theme.zero, zero / 255),
            (theme.hole, max(0, 255 - data - filled - zero) / 255),
        ]
        total = sum(weight for _, weight in weights)
        colour = theme.hole
        if total:
            red, green, blue = (
                round(sum(rgb[channel] * weight for rgb, weight in weights) / total)
                for channel in range(3)
            )
            colour = red, green, blue
        if self._compared:
            colour = _mixed(_grey(colour, 0.5), theme.hole, 0.6)
        if touched:
            colour = _mixed(colour, theme.touched, 0.45 + 0.55 * touched / 255)
        if changed:
            colour = _mixed(colour, theme.changed, 0.45 + 0.55 * changed / 255)
        return colour


def _mixed(a: Rgb, b: Rgb, share: float) -> Rgb:
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _grey(colour: Rgb, share: float) -> Rgb:
    light = round(0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2])
    return _mixed(colour, (light, light, light), share)


def hex_of(colour: Rgb) -> str:
    """Return ``#rrggbb``."""
    return "#" + bytes(colour).hex()
