"""A map as a drawing: texts that scale, and the cells as images inside of it."""

from __future__ import annotations

from pyqmigrate.analysis.map_report import MemoryMap
from pyqmigrate.analysis.picture.colours import THEMES, Painter, ThemeName, hex_of
from pyqmigrate.analysis.picture.labels import legend_of
from pyqmigrate.analysis.picture.sheet import LEFT, LEGEND_LINE, pixels_of, sheet_of
from pyqmigrate.format.png import encode_png
from pyqmigrate.format.svg import Svg

__all__ = ["svg_of"]

_SAMPLE = 18  # pixels
_COLUMN = 620  # of the legend


def svg_of(found: MemoryMap, theme: ThemeName = ThemeName.LIGHT) -> bytes:
    """Return the drawing, a whole SVG file."""
    colours = THEMES[theme]
    painter = Painter(colours, compared=found.against is not None or found.working_set)
    legend = legend_of(found)
    entries = [*legend.entries(painter)]
    sheet = sheet_of(found, len(entries))
    text, faint = hex_of(colours.text), hex_of(colours.faint)
    svg = Svg(sheet.width, sheet.height, legend.title[0], background=hex_of(colours.background))
    for number, line in enumerate(legend.title):
        svg.text(LEFT, 22 + 16 * number, line, text, size=14)
    for band in sheet.bands:
        png = encode_png(pixels_of(band, painter), sheet.columns)
        svg.image(LEFT, band.y, sheet.columns * band.cell, band.height, png)
    for label in sheet.addresses:
        svg.text(LEFT - 10, label.y + 4, label.text, faint, size=11, anchor="end", monospace=True)
    for label in sheet.names:
        svg.text(LEFT + 1024 + 12, label.y + 4, label.text, text)
    for number, (line, sample) in enumerate(entries):
        x, y = LEFT + number % 2 * _COLUMN, sheet.legend + number // 2 * LEGEND_LINE
        for place, (_, colour) in enumerate(sample):
            svg.rectangle(x + place * _SAMPLE, y, _SAMPLE, 12, hex_of(colour))
        svg.text(x + len(sample) * _SAMPLE + 8, y + 10, line, text)
    return svg.encode()
