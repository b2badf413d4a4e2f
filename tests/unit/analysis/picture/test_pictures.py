"""A map on a terminal, as PNG and as SVG."""

from __future__ import annotations

import base64
import io
import itertools
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from pyqmigrate.analysis.areas import Area, By, Part
from pyqmigrate.analysis.map_report import MappedArea, MemoryMap
from pyqmigrate.analysis.picture.colours import THEMES, Kind, Painter, ThemeName, kind_of
from pyqmigrate.analysis.picture.png import png_of
from pyqmigrate.analysis.picture.rows import rows_of
from pyqmigrate.analysis.picture.sheet import sheet_of
from pyqmigrate.analysis.picture.svg import svg_of
from pyqmigrate.analysis.picture.terminal import Colours, colours_of, draw, grid, theme_of
from pyqmigrate.io.page_map import Counts

CELL = 1 << 20
DATA = bytes((1, 255, 0, 0, 128, 0, 0, 0))
FILLED = bytes((1, 0, 255, 0, 0, 0, 0, 0))
HOLE = bytes((1, 0, 0, 0, 0, 0, 0, 0))
CHANGED = bytes((1, 255, 0, 0, 128, 255, 0, 0))
NOTHING = bytes(8)


def made(
    cells: list[bytes], *, start: int = 0, name: str = "ram", against: str | None = None
) -> MemoryMap:
    part = Part(name, 0, len(cells) * CELL, start)
    rom = MappedArea(Area("rom", (Part("rom", 0, CELL, 0),)), FILLED)
    return MemoryMap(
        snapshot="guest",
        against=against,
        machine="pc",
        by=By.ADDRESS,
        cell_size=CELL,
        areas=(MappedArea(Area(None, (part,)), b"".join(cells)), rom),
        page_sizes={name: 4096, "rom": 4096},
        pages=Counts(data=256, hole=512),
        levels=(0,) * 16,
        working_set=False,
        bytes_read=0,
        seconds=0.0,
    )


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# ---- rows ----


def test_a_row_starts_at_a_multiple_of_its_length() -> None:
    rows = [*rows_of(made([DATA] * 10, start=3 * CELL), 4)]
    assert [row.start for row in rows] == [0, 4 * CELL, 8 * CELL, 12 * CELL, 0]
    assert rows[0].cells == (NOTHING,) * 3 + (DATA,)
    assert rows[3].cells == (DATA,) + (NOTHING,) * 3
    assert [row.first for row in rows] == [True, False, False, False, True]
    assert [row.names for row in rows] == [("ram",), (), (), (), ("rom",)]


# ---- colours ----


def test_each_class_has_a_colour_of_its_own_in_both_themes() -> None:
    for theme in THEMES.values():
        painter = Painter(theme, compared=False)
        cells = [DATA, FILLED, HOLE, bytes((1, 0, 0, 255, 0, 0, 0, 0)), CHANGED]
        colours = [painter(cell) for cell in cells]
        assert len({*colours}) == len(colours)
        assert painter(NOTHING) is None


def test_the_ramp_is_lighter_with_each_bit_of_entropy() -> None:
    painter = Painter(THEMES[ThemeName.LIGHT], compared=False)
    weights = 0.2126, 0.7152, 0.0722
    light = [
        sum(a * b for a, b in zip(painter.by_entropy(n / 4), weights, strict=True))
        for n in range(33)
    ]
    assert all(later > earlier for earlier, later in itertools.pairwise(light))


def test_a_page_of_data_among_many_holes_can_be_seen() -> None:
    painter = Painter(THEMES[ThemeName.LIGHT], compared=False)
    one, none = painter(bytes((1, 1, 0, 0, 128, 0, 0, 0))), painter(HOLE)
    assert one is not None
    assert none is not None
    assert sum(abs(a - b) for a, b in zip(one, none, strict=True)) > 20


@pytest.mark.parametrize(
    ("cell", "kind"),
    [(NOTHING, Kind.NOTHING), (HOLE, Kind.HOLE), (FILLED, Kind.FILLED), (DATA, Kind.DATA),
     (CHANGED, Kind.CHANGED)],
)  # fmt: skip
def test_the_kind_of_a_cell_is_the_most_remarkable_of_what_it_has(cell: bytes, kind: Kind) -> None:
    assert kind_of(cell) is kind


# ---- terminal ----


@pytest.mark.parametrize("width", [20, 40, 80, 120, 200, 400])
@pytest.mark.parametrize("colours", Colours)
def test_a_row_fits_the_width(width: int, colours: Colours) -> None:
    columns, cells = grid(max(width, 21))
    found = made([DATA, HOLE] * (cells // 2))
    lines = [*draw(found, width, colours, ThemeName.DARK)]
    rows = [plain(line) for line in lines if re.match(r" *0x", plain(line))]
    assert len(rows) > 5
    assert max(map(len, rows)) <= max(width, 21)
    assert columns == 1 << (columns.bit_length() - 1)


def test_without_colours_no_line_has_an_escape() -> None:
    text = "\n".join(draw(made([DATA, HOLE, FILLED, CHANGED]), 80, Colours.NONE, ThemeName.DARK))
    assert "\x1b" not in text
    assert "▅·=x" in text


def test_an_encoding_without_blocks_gets_ascii() -> None:
    found = made([DATA, HOLE, FILLED])
    lines = [*draw(found, 80, Colours.TRUE, ThemeName.DARK, "ascii")]
    text = "\n".join(lines)
    assert text.isascii()
    assert "5.=" in text


@pytest.mark.parametrize(
    ("colours", "code"),
    [(Colours.TRUE, r"38;2;\d+;\d+;\d+"), (Colours.MANY, r"38;5;\d+"), (Colours.SIXTEEN, r"\b3\d")],
)
def test_a_cell_is_painted_in_the_colours_that_there_are(colours: Colours, code: str) -> None:
    text = "\n".join(draw(made([DATA] * 64), 80, colours, ThemeName.DARK))
    assert re.search(rf"\x1b\[{code}", text)
    assert ("38;2;" in text) == (colours is Colours.TRUE)


@pytest.mark.parametrize(
    ("environment", "colours"),
    [
        ({"TERM": "xterm-256color"}, Colours.MANY),
        ({"TERM": "xterm"}, Colours.SIXTEEN),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, Colours.TRUE),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, Colours.NONE),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, Colours.NONE),
        ({}, Colours.NONE),
    ],
)
def test_the_colours_are_those_of_the_terminal(
    environment: dict[str, str], colours: Colours
) -> None:
    assert colours_of(environment, True) is colours
    assert colours_of(environment, False) is Colours.NONE


def test_a_light_terminal_gets_the_light_theme() -> None:
    assert theme_of({"COLORFGBG": "0;15"}) is ThemeName.LIGHT
    assert theme_of({"COLORFGBG": "15;0"}) is theme_of({}) is ThemeName.DARK


def test_a_name_that_could_control_the_terminal_is_escaped() -> None:
    found = made([DATA], name="\x1b[31mram")
    text = "\n".join(draw(found, 200, Colours.NONE, ThemeName.DARK))
    assert "\x1b" not in text
    assert "\\x1b[31mram" in text


# ---- images ----


@pytest.mark.parametrize("theme", ThemeName)
def test_an_image_has_its_size_and_the_colour_of_data(theme: ThemeName) -> None:
    image = pytest.importorskip("PIL.Image")
    found = made([DATA] * 256)
    opened = image.open(io.BytesIO(png_of(found, theme)))
    pixels = np.asarray(opened.convert("RGB"))
    sheet = sheet_of(found, 4)
    assert pixels.shape == (sheet.height, sheet.width, 3)
    colour = Painter(THEMES[theme], compared=False)(DATA)
    assert (pixels == np.array(colour, dtype=np.uint8)).all(axis=2).sum() > 1000
    assert tuple(pixels[0, 0]) == THEMES[theme].background


def test_labels_of_an_image_do_not_overlap() -> None:
    sheet = sheet_of(made([DATA, HOLE] * 3000), 4)
    for labels in (sheet.addresses, sheet.names):
        places = [label.y for label in labels]
        assert all(b - a >= 12 for a, b in itertools.pairwise(places))
    assert sheet.legend + 20 < sheet.height


def test_a_drawing_is_xml_with_an_image_for_each_area_and_its_names() -> None:
    root = ElementTree.fromstring(svg_of(made([DATA] * 100, name="a<b>&'\"c")))
    space = "{http://www.w3.org/2000/svg}"
    images = root.findall(f"{space}image")
    assert len(images) == 2
    for each in images:
        kind, _, data = each.attrib["href"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    texts = [text.text for text in root.findall(f"{space}text")]
    assert "a<b>&'\"c" in texts
    assert "block rom" in texts
    assert any("data, 0 to 8 bits" in (text or "") for text in texts)


def test_changed_pages_have_a_line_of_the_legend_and_mute_the_others() -> None:
    found = made([DATA, CHANGED], against="monday")
    text = svg_of(found).decode()
    assert "changed against monday" in text
    painter = Painter(THEMES[ThemeName.LIGHT], compared=True)
    assert painter(DATA) != Painter(THEMES[ThemeName.LIGHT], compared=False)(DATA)
    assert painter(CHANGED) == THEMES[ThemeName.LIGHT].changed
