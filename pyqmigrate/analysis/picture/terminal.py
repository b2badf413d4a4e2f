"""A map in characters: half blocks in colours, or one sign for each cell without colours."""

from __future__ import annotations

import enum
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

from pyqmigrate.analysis.map_report import MemoryMap
from pyqmigrate.analysis.picture.colours import THEMES, Kind, Painter, Rgb, ThemeName, kind_of
from pyqmigrate.analysis.picture.labels import legend_of, names_of
from pyqmigrate.analysis.picture.rows import NOTHING, Row, rows_of

__all__ = ["Colours", "colours_of", "draw", "grid", "terminal_width", "theme_of"]

_LABEL = 13  # characters of an address, and a space
_ROWS = {8: 20, 16: 32, 32: 40, 64: 40}  # by columns
_MOST_ROWS = 64
_BLOCKS = "▁▂▃▄▅▆▇█"
_SIGNS = {Kind.NOTHING: " ", Kind.HOLE: "·", Kind.ZERO: "0", Kind.FILLED: "="}
_ASCII = {"·": ".", "─": "-"} | {block: str(n + 1) for n, block in enumerate(_BLOCKS)}
# The colours of most terminals that have 16.
_SIXTEEN: tuple[Rgb, ...] = (
    (0, 0, 0), (170, 0, 0), (0, 170, 0), (170, 85, 0), (0, 0, 170), (170, 0, 170), (0, 170, 170),
    (170, 170, 170), (85, 85, 85), (255, 85, 85), (85, 255, 85), (255, 255, 85), (85, 85, 255),
    (255, 85, 255), (85, 255, 255), (255, 255, 255),
)  # fmt: skip
# Which of them are the classes, and data by two bits of entropy: mixtures would all be grey.
_OF_KIND = {Kind.HOLE: 8, Kind.ZERO: 7, Kind.FILLED: 14, Kind.TOUCHED: 13, Kind.CHANGED: 9}
_OF_ENTROPY = (4, 6, 2, 11)
_RESET = "\x1b[0m"


class Colours(enum.StrEnum):
    """How many colours are used."""

    NONE = "none"
    SIXTEEN = "16"
    MANY = "256"
    TRUE = "true"


def colours_of(environment: Mapping[str, str], terminal: bool) -> Colours:
    """Return what standard output can show: by NO_COLOR, TERM and COLORTERM, and if it is a terminal."""
    name = environment.get("TERM", "")
    if not terminal or environment.get("NO_COLOR") or name in ("", "dumb"):
        return Colours.NONE
    if environment.get("COLORTERM") in ("truecolor", "24bit") or name.endswith("-direct"):
        return Colours.TRUE
    return Colours.MANY if "256" in name else Colours.SIXTEEN


def theme_of(environment: Mapping[str, str]) -> ThemeName:
    """Return the theme of the terminal: dark, unless COLORFGBG names a light background."""
    background = environment.get("COLORFGBG", "").rpartition(";")[2]
    return ThemeName.LIGHT if background in ("7", "15") else ThemeName.DARK


def grid(width: int) -> tuple[int, int]:
    """Return the columns for a terminal of ``width`` characters, a power of two, and how many cells."""
    columns = 8
    while columns * 2 + _LABEL <= width:
        columns *= 2
    return columns, columns * _ROWS.get(columns, _MOST_ROWS)


def draw(
    found: MemoryMap, width: int, colours: Colours, theme: ThemeName, encoding: str = "utf-8"
) -> Iterator[str]:
    """Yield the lines of a picture that is ``width`` characters wide, and its legend.

    Without colours or in an encoding without block characters, each cell is a sign, and a row a line.
    """
    columns, _ = grid(width)
    plain = colours is Colours.NONE or not _has_blocks(encoding)
    compared = found.against is not None or found.working_set
    painter = Painter(THEMES[theme], compared=compared)
    paint = _of_sixteen if colours is Colours.SIXTEEN else painter
    legend = legend_of(found)
    yield from legend.title
    long = False  # whether the area before takes more than a line
    for _, group in itertools.groupby(_numbered(found, columns), _by_area):
        lines = [
            *_lines([row for _, row in group], paint, colours, plain, width, columns, encoding)
        ]
        if long or len(lines) > 1:
            yield ""
        long = len(lines) > 1
        yield from lines
    yield ""
    for text, sample in legend.entries(painter):
        if plain:
            sign = "".join(_sign(cell, encoding) for cell, _ in sample)
        elif colours is Colours.SIXTEEN:
            sign = _half_blocks([(paint(cell), paint(cell)) for cell, _ in sample], colours)
        else:
            sign = _half_blocks([(colour, colour) for _, colour in sample], colours)
        yield f"{sign} {text}"


def _numbered(found: MemoryMap, columns: int) -> Iterator[tuple[int, Row]]:
    area = 0
    for row in rows_of(found, columns):
        area += row.first
        yield area, row


def _by_area(item: tuple[int, Row]) -> int:
    return item[0]


def _lines(
    rows: Sequence[Row],
    paint: Callable[[bytes], Rgb | None],
    colours: Colours,
    plain: bool,
    width: int,
    columns: int,
    encoding: str,
) -> Iterator[str]:
    step = 1 if plain else 2
    for number in range(0, len(rows), step):
        upper = rows[number]
        lower = rows[number + 1] if step == 2 and number + 1 < len(rows) else None
        below = lower.cells if lower is not None else (NOTHING,) * columns
        used = max(_used(upper.cells), _used(below))
        names = names_of([*dict.fromkeys((*upper.names, *(lower.names if lower else ())))], width)
        room = width - _LABEL - used - 1
        if len(names) > room:  # on a line of its own
            yield f"{'':{_LABEL}}{names_of([names], width - _LABEL)}"
            names = ""
        if plain:
            body = "".join(_sign(cell, encoding) for cell in upper.cells[:used])
        else:
            pairs = zip(upper.cells[:used], below[:used], strict=True)
            body = _half_blocks([(paint(a), paint(b)) for a, b in pairs], colours)
        yield f"{upper.start:#{_LABEL - 1}x} {body} {names}".rstrip(" ")


def _used(cells: Sequence[bytes]) -> int:
    """Return the number of cells up to the last one with memory."""
    return max((number + 1 for number, cell in enumerate(cells) if cell[0]), default=0)


def _sign(cell: bytes, encoding: str) -> str:
    kind = kind_of(cell)
    if kind is Kind.CHANGED:
        return "x"
    if kind is Kind.TOUCHED:
        return "+"
    sign = _BLOCKS[min(cell[4] // 32, 7)] if kind is Kind.DATA else _SIGNS[kind]
    return sign if _has_blocks(encoding) else _ASCII.get(sign, sign)


@functools.cache
def _has_blocks(encoding: str) -> bool:
    try:
        (_BLOCKS + "▀▄·").encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _half_blocks(pairs: Sequence[tuple[Rgb | None, Rgb | None]], colours: Colours) -> str:
    text, last = "", ""
    for upper, lower in pairs:
        sign, codes = "▀", ""
        if upper is not None and lower is not None:
            codes = f"{_code(upper, colours, 0)};{_code(lower, colours, 10)}"
        elif upper is not None:
            codes = f"{_code(upper, colours, 0)};49"
        elif lower is not None:
            sign, codes = "▄", f"{_code(lower, colours, 0)};49"
        else:
            sign, codes = " ", "39;49"
        if codes != last:
            text += f"\x1b[{codes}m"
            last = codes
        text += sign
    return text + _RESET


def _code(colour: Rgb, colours: Colours, shift: int) -> str:
    """Return the number that selects a colour for the sign, with ``shift`` 10 for its background."""
    if colours is Colours.TRUE:
        return f"{38 + shift};2;{colour[0]};{colour[1]};{colour[2]}"
    if colours is Colours.MANY:
        return f"{38 + shift};5;{_of_256(colour)}"
    number = _nearest(colour, _SIXTEEN)
    return str((30 if number < 8 else 82) + number + shift)


@functools.cache
def _of_256(colour: Rgb) -> int:
    levels = (0, 95, 135, 175, 215, 255)
    cube = [min(range(6), key=lambda n: abs(levels[n] - value)) for value in colour]
    greys = range(8, 248, 10)
    light = sum(colour) // 3
    grey = min(range(len(greys)), key=lambda n: abs(greys[n] - light))
    red, green, blue = (levels[n] for n in cube)
    choices = ((red, green, blue), (greys[grey], greys[grey], greys[grey]))
    if _nearest(colour, choices) == 1:
        return 232 + grey
    return 16 + 36 * cube[0] + 6 * cube[1] + cube[2]


def _nearest(colour: Rgb, choices: Sequence[Rgb]) -> int:
    def distance(number: int) -> int:
        return sum((a - b) ** 2 for a, b in zip(colour, choices[number], strict=True))

    return min(range(len(choices)), key=distance)


def _of_sixteen(cell: bytes) -> Rgb | None:
    kind = kind_of(cell)
    if kind is Kind.NOTHING:
        return None
    number = _OF_ENTROPY[min(cell[4] // 64, 3)] if kind is Kind.DATA else _OF_KIND[kind]
    return _SIXTEEN[number]


def terminal_width(environment: Mapping[str, str] = os.environ) -> int:
    """Return the width of the terminal: COLUMNS, or as the system says, or 80."""
    given = environment.get("COLUMNS", "")
    return int(given) if given.isdecimal() and int(given) else shutil.get_terminal_size().columns
