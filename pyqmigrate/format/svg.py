"""Pictures as SVG: rectangles, lines, texts and images, on light and dark backgrounds.

    svg = Svg(640, 120, "What it shows")
    svg.rectangle(10, 10, 100, 20, "#2a78d6", tip="shown under the pointer")
    svg.text(10, 60, "a label", "ink")
    svg.encode()

Lengths are in pixels. A colour is CSS's, or one of the names of :data:`COLOURS`, whose values follow the
reader's preference for a light or a dark scheme. Texts may come from untrusted files: what XML has no place
for is shown as escapes.
"""

from __future__ import annotations

import base64
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

from pyqmigrate.format.printable import printable

__all__ = ["COLOURS", "Svg", "is_svg", "nice_step", "text_width"]

# By name: in a light scheme, in a dark one.
COLOURS = {
    "surface": ("#fcfcfb", "#1a1a19"),
    "ink": ("#0b0b0b", "#ffffff"),
    "muted": ("#52514e", "#c3c2b7"),
    "grid": ("#e4e3df", "#383835"),
    "blue": ("#2a78d6", "#3987e5"),
    "pale-blue": ("#9ec5f4", "#184f95"),
    "aqua": ("#1baf7a", "#199e70"),
    "yellow": ("#eda100", "#c98500"),
    "red": ("#e34948", "#e66767"),
    "grey": ("#b5b3ad", "#6b6a66"),
    "pale-grey": ("#dddcd8", "#45443f"),
}
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
_MONOSPACE = "ui-monospace, 'DejaVu Sans Mono', monospace"
_HEAD = '<svg xmlns="http://www.w3.org/2000/svg" data-by="pyqmigrate"'
_WIDTH = 0.56  # of a character, by its height: what the fonts above have, and a little more


def is_svg(head: bytes) -> bool:
    """Return whether a file with these first 64 bytes is an SVG of this package."""
    return head.startswith(_HEAD.encode())


def text_width(text: str, size: float = 12) -> float:
    """Return about how wide a text is, in pixels; ``size`` is its height."""
    return len(text) * size * _WIDTH


def nice_step(longest: float, steps: int) -> float:
    """Return 1, 2 or 5 times a power of ten: the distance of at most ``steps`` ticks up to ``longest``.

    ``longest`` is positive.
    """
    step = 1.0
    while step * steps >= longest:
        step /= 10
    while True:
        for factor in (1, 2, 5):
            if step * factor * steps >= longest:
                return step * factor
        step *= 10


class Svg:
    """A picture of ``width`` times ``height`` pixels; ``title`` says what it shows."""

    def __init__(
        self,
        width: float,
        height: float,
        title: str,
        description: str = "",
        *,
        background: str = "surface",
    ) -> None:
        self.width, self.height = width, height
        self._background = background
        self._parts: list[str] = []
        self._head = [
            f'{_HEAD} viewBox="0 0 {_number(width)} {_number(height)}"'
            f' width="{_number(width)}" height="{_number(height)}" role="img"'
            f' font-family="{_FONT}" font-size="12">',
            f"<title>{_text(title)}</title>",
        ]
        if description:
            self._head.append(f"<desc>{_text(description)}</desc>")

    def rectangle(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: str,
        *,
        radius: float = 0,
        tip: str = "",
    ) -> None:
        """Draw a filled rectangle. ``tip`` is shown under the pointer."""
        shape = (
            f'<rect x="{_number(x)}" y="{_number(y)}" width="{_number(width)}"'
            f' height="{_number(height)}"{_corner(radius)} {_paint("fill", colour)}'
        )
        self._parts.append(f"{shape}><title>{_text(tip)}</title></rect>" if tip else f"{shape}/>")

    def line(
        self,
        points: list[tuple[float, float]],
        colour: str,
        *,
        width: float = 1,
        dashed: bool = False,
    ) -> None:
        """Draw a line through at least two points."""
        path = "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(
            f'<path d="M{path}" fill="none" {_paint("stroke", colour)}'
            f' stroke-width="{_number(width)}" stroke-linejoin="round"{dashes}/>'
        )

    def circle(self, x: float, y: float, radius: float, colour: str, *, tip: str = "") -> None:
        """Draw a filled circle with a rim in the colour of the background."""
        shape = (
            f'<circle cx="{_number(x)}" cy="{_number(y)}" r="{_number(radius)}" stroke-width="2"'
            f" {_paint('fill', colour)} {_paint('stroke', 'surface')}"
        )
        self._parts.append(f"{shape}><title>{_text(tip)}</title></circle>" if tip else f"{shape}/>")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        colour: str = "ink",
        *,
        size: float = 12,
        anchor: Literal["start", "middle", "end"] = "start",
        bold: bool = False,
        monospace: bool = False,
    ) -> None:
        """Write a text; ``y`` is its baseline."""
        weight = ' font-weight="600"' if bold else ""
        font = f' font-family="{_MONOSPACE}"' if monospace else ""
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        height = "" if size == 12 else f' font-size="{_number(size)}"'
        self._parts.append(
            f'<text x="{_number(x)}" y="{_number(y)}"{where}{height}{weight}{font}'
            f" {_paint('fill', colour)}>{_text(text)}</text>"
        )

    def image(self, x: float, y: float, width: float, height: float, png: bytes) -> None:
        """Draw a PNG, scaled to this size, whose pixels stay sharp."""
        self._parts.append(
            f'<image x="{_number(x)}" y="{_number(y)}" width="{_number(width)}"'
            f' height="{_number(height)}" preserveAspectRatio="none" style="image-rendering:pixelated"'
            f' href="data:image/png;base64,{base64.b64encode(png).decode()}"/>'
        )

    def encode(self) -> bytes:
        """Return the file."""
        background = f'<rect width="100%" height="100%" {_paint("fill", self._background)}/>'
        drawn = "".join([background, *self._parts])
        used = {name for name in COLOURS if f"--{name})" in drawn}
        light, dark = (
            "".join(f"--{name}:{COLOURS[name][scheme]};" for name in COLOURS if name in used)
            for scheme in (0, 1)
        )
        style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
        styles = [style] if used else []
        return "\n".join([*self._head, *styles, background, *self._parts, "</svg>", ""]).encode()


def _text(text: str) -> str:
    return escape(printable(text))


def _paint(what: str, colour: str) -> str:
    return f"{what}={quoteattr(f'var(--{colour})' if colour in COLOURS else colour)}"


def _corner(radius: float) -> str:
    return f' rx="{_number(radius)}"' if radius else ""


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
