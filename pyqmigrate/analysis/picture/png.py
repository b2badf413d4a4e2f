"""A map as an image. The texts beside it need a font, and Pillow has one; the cells would not need it."""

from __future__ import annotations

import io

from pyqmigrate.analysis.map_report import MemoryMap
from pyqmigrate.analysis.picture.colours import THEMES, Painter, ThemeName
from pyqmigrate.analysis.picture.labels import legend_of
from pyqmigrate.analysis.picture.sheet import LEFT, LEGEND_LINE, pixels_of, sheet_of
from pyqmigrate.errors import NotSupported
from pyqmigrate.format.png import mark

__all__ = ["check_available", "png_of"]

_SAMPLE = 18  # pixels
_COLUMN = 620  # of the legend


def check_available() -> None:
    """Raise NotSupported, with the command to run, if Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise NotSupported(
            "an image needs Pillow, which is not installed: pip install pillow, or write --svg or --html"
        ) from error


def png_of(found: MemoryMap, theme: ThemeName = ThemeName.LIGHT) -> bytes:
    """Return the image, a whole PNG file with the mark of this package. Raises NotSupported without Pillow."""
    check_available()
    from PIL import Image, ImageDraw, ImageFont

    colours = THEMES[theme]
    painter = Painter(colours, compared=found.against is not None or found.working_set)
    legend = legend_of(found)
    entries = [*legend.entries(painter)]
    sheet = sheet_of(found, len(entries))
    image = Image.new("RGB", (sheet.width, sheet.height), colours.background)
    draw = ImageDraw.Draw(image)
    large, font, small = (ImageFont.load_default(size) for size in (15, 13, 12))
    for number, line in enumerate(legend.title):
        draw.text((LEFT, 16 + 16 * number), line, colours.text, large, "lm")
    for band in sheet.bands:
        size = sheet.columns, len(band.rows)
        cells = Image.frombytes("RGB", size, b"".join(pixels_of(band, painter)))
        scaled = cells.resize((size[0] * band.cell, band.height), Image.Resampling.NEAREST)
        image.paste(scaled, (LEFT, band.y))
    for label in sheet.addresses:
        draw.text((LEFT - 10, label.y), label.text, colours.faint, small, "rm")
    for label in sheet.names:
        draw.text((LEFT + 1024 + 12, label.y), label.text, colours.text, font, "lm")
    for number, (line, sample) in enumerate(entries):
        x, y = LEFT + number % 2 * _COLUMN, sheet.legend + number // 2 * LEGEND_LINE
        for place, (_, colour) in enumerate(sample):
            left = x + place * _SAMPLE
            draw.rectangle((left, y, left + _SAMPLE - 1, y + 11), colour)
        draw.text((x + len(sample) * _SAMPLE + 8, y + 6), line, colours.text, font, "lm")
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return mark(data.getvalue())
