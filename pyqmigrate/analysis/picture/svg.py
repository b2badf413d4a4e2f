"""A map as a drawing: texts that scale, and the cells as images inside of it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from xml.sax.saxutils import escape

from pyqmigrate.analysis.map_report import MemoryMap
from pyqmigrate.analysis.picture.colours import THEMES, Painter, Theme, ThemeName, hex_of
from pyqmigrate.analysis.picture.labels import legend_of
from pyqmigrate.analysis.picture.sheet import LEFT, LEGEND_LINE, encode_png, pixels_of, sheet_of

__all__ = ["svg_of"]

_FONT = "font-family='ui-sans-serif, system-ui, sans-serif' font-size='12'"
_SAMPLE = 18  # pixels
_COLUMN = 620  # of the legend


def svg_of(found: MemoryMap, theme: ThemeName = ThemeName.LIGHT) -> bytes:
    """Return the drawing, a whole SVG file."""
    colours = THEMES[theme]
    painter = Painter(colours, compared=found.against is not None or found.working_set)
    return "\n".join(_elements(found, painter, colours)).encode() + b"\n"


def _elements(found: MemoryMap, painter: Painter, theme: Theme) -> Iterator[str]:
    legend = legend_of(found)
    entries = [*legend.entries(painter)]
    sheet = sheet_of(found, len(entries))
    text, faint = hex_of(theme.text), hex_of(theme.faint)
    yield (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{sheet.width}' height='{sheet.height}' "
        f"viewBox='0 0 {sheet.width} {sheet.height}' {_FONT}>"
    )
    yield f"<rect width='100%' height='100%' fill='{hex_of(theme.background)}'/>"
    for number, line in enumerate(legend.title):
        yield f"<text x='{LEFT}' y='{22 + 16 * number}' font-size='14' fill='{text}'>{_text(line)}</text>"
    for band in sheet.bands:
        image = base64.b64encode(encode_png(pixels_of(band, painter), sheet.columns)).decode()
        yield (
            f"<image x='{LEFT}' y='{band.y}' width='{sheet.columns * band.cell}' "
            f"height='{band.height}' preserveAspectRatio='none' style='image-rendering:pixelated' "
            f"href='data:image/png;base64,{image}'/>"
        )
    for label in sheet.addresses:
        yield (
            f"<text x='{LEFT - 10}' y='{label.y + 4:.1f}' text-anchor='end' fill='{faint}' "
            f"font-family='ui-monospace, monospace' font-size='11'>{label.text}</text>"
        )
    right = LEFT + 1024 + 12
    for label in sheet.names:
        yield f"<text x='{right}' y='{label.y + 4:.1f}' fill='{text}'>{_text(label.text)}</text>"
    for number, (line, sample) in enumerate(entries):
        x, y = LEFT + number % 2 * _COLUMN, sheet.legend + number // 2 * LEGEND_LINE
        for place, (_, colour) in enumerate(sample):
            yield (
                f"<rect x='{x + place * _SAMPLE}' y='{y}' width='{_SAMPLE}' height='12' "
                f"fill='{hex_of(colour)}'/>"
            )
        after = x + len(sample) * _SAMPLE + 8
        yield f"<text x='{after}' y='{y + 10}' fill='{text}'>{_text(line)}</text>"
    yield "</svg>"


def _text(text: str) -> str:
    # Names come from files; XML has no place for some characters, which printable() has escaped.
    return escape(text)
