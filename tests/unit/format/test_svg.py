"""Pictures as SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.format.svg import Svg, is_svg, nice_step


def test_shapes_are_in_the_order_in_which_they_were_drawn() -> None:
    svg = Svg(100, 50, "title", "description")
    svg.line([(0, 0), (10, 5.5)], "grid", dashed=True)
    svg.rectangle(1, 2, 3.257, 4, "blue", radius=2)
    svg.circle(5, 5, 2, "#ff0000", tip="here")
    svg.text(3, 4, "a < b", anchor="end", bold=True)
    root = ET.fromstring(svg.encode())
    names = [element.tag.rpartition("}")[2] for element in root]
    assert names == ["title", "desc", "style", "rect", "path", "rect", "circle", "text"]
    assert root[4].get("d") == "M0 0L10 5.5"
    assert root[5].get("width") == "3.26"
    assert root[7].text == "a < b"


def test_picture_is_recognized_by_its_first_bytes() -> None:
    assert is_svg(Svg(1, 1, "t").encode()[:64])
    assert not is_svg(b"<?xml version='1.0'?><svg>")


def test_text_that_xml_has_no_place_for_is_shown_as_escapes() -> None:
    svg = Svg(10, 10, "a\0b", "c\x1bd")
    svg.text(0, 0, "\ud800<&\u202e")
    svg.rectangle(0, 0, 1, 1, "blue", tip="\x07")
    shown = "".join(ET.fromstring(svg.encode()).itertext())
    assert r"a\x00b" in shown
    assert r"c\x1bd" in shown
    assert r"\ud800<&\u202e" in shown
    assert r"\x07" in shown


def test_fixed_background_needs_no_style_and_an_image_is_inside_of_the_file() -> None:
    svg = Svg(10, 10, "t", background="#123456")
    svg.image(1, 2, 3, 4, b"\x89PNG")
    _, background, image = ET.fromstring(svg.encode())
    assert background.get("fill") == "#123456"
    assert image.get("href") == "data:image/png;base64,iVBORw=="


def test_attributes_are_quoted() -> None:
    svg = Svg(10, 10, "t")
    svg.rectangle(0, 0, 1, 1, 'a"b<c')
    assert ET.fromstring(svg.encode())[-1].get("fill") == 'a"b<c'


@given(st.floats(1e-9, 1e12), st.integers(1, 20))
def test_ticks_are_as_many_as_fit(longest: float, steps: int) -> None:
    step = nice_step(longest, steps)
    assert step * steps >= longest
    assert longest / step > steps / 3  # the next smaller step would be too small
    assert f"{step:.0e}"[0] in "125"


@pytest.mark.parametrize(("longest", "step"), [(10, 1), (11, 2), (0.9, 0.1), (45, 5)])
def test_steps_are_one_two_or_five(longest: float, step: float) -> None:
    assert nice_step(longest, 10) == pytest.approx(step)
