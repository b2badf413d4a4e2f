"""The picture of a save."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from pyqmigrate.cli.vm.timeline import picture
from pyqmigrate.vm.outgoing.timeline import Phase

SVG = "{http://www.w3.org/2000/svg}"
SAVE = [
    Phase("guest", "runs", 0.0, 1.0),
    Phase("guest", "stopped", 1.0, 1.02),
    Phase("guest", "runs", 1.02, 2.0),
    Phase("qemu", "device state", 1.001, 1.005),
    Phase("channel 1", "write", 0.1, 0.9, 1200),
    Phase("channel 2", "write", 0.1, 0.7, 900),
    Phase("channel 10", "write", 0.1, 0.7, 900),
    Phase("file", "fsync", 1.1, 1.9),
]


def drawn(phases: list[Phase], title: str = "t", subtitle: str = "s") -> ET.Element:
    return ET.fromstring(picture(phases, title, subtitle))


def texts(root: ET.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def tips(root: ET.Element) -> list[str]:
    return [
        title.text or "" for shape in root.iter(f"{SVG}rect") for title in shape.iter(f"{SVG}title")
    ]


def test_lanes_go_from_the_guest_to_the_file() -> None:
    lanes = {"guest", "QEMU", "channel 1", "channel 2", "channel 10", "file"}
    shown = [text for text in texts(drawn(SAVE)) if text in lanes][: len(lanes)]
    assert shown == ["guest", "QEMU", "channel 1", "channel 2", "channel 10", "file"]


def test_short_pause_is_marked_and_magnified() -> None:
    shown = texts(drawn(SAVE))
    assert shown.count("paused 20 ms") == 2
    assert "the pause" in shown


def test_long_pause_needs_no_second_panel() -> None:
    phases = [Phase("guest", "runs", 0, 1), Phase("guest", "stopped", 1, 9)]
    shown = texts(drawn([*phases, Phase("guest", "runs", 9, 10)]))
    assert "paused 8.00 s" in shown
    assert "the pause" not in shown


def test_guest_that_never_ran_has_no_pause() -> None:
    assert not any("paused" in text for text in texts(drawn([Phase("guest", "stopped", 0, 1)])))


def test_every_phase_says_how_long_it_took() -> None:
    shown = tips(drawn(SAVE))
    assert "channel 1: write, 800 ms from 100 ms on, 1,200 pages" in shown
    assert "file: fsync, 800 ms from 1.10 s on" in shown


def test_phases_of_a_lane_that_overlap_are_below_each_other() -> None:
    phases = [Phase("qemu", "outer", 0, 1), Phase("qemu", "inner", 0.2, 0.4)]
    boxes = [
        rect for rect in drawn(phases).iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None
    ]
    assert len({box.get("y") for box in boxes}) == 2


def test_everything_is_inside_the_picture() -> None:
    root = drawn(SAVE)
    width, height = (float(root.get(name, "0")) for name in ("width", "height"))
    for box in root.iter(f"{SVG}rect"):
        if box.get("x") is not None:
            x, y, w, h = (float(box.get(name, "0")) for name in ("x", "y", "width", "height"))
            assert 0 <= x <= x + w <= width
            assert 0 <= y <= y + h <= height


@pytest.mark.parametrize("phases", [[], [Phase("guest", "runs", 0.0, 0.0)]])
def test_nothing_to_show_is_a_picture_too(phases: list[Phase]) -> None:
    assert "t" in texts(drawn(phases))


def test_names_are_escaped() -> None:
    assert "<a&b>" in texts(drawn(SAVE, title="<a&b>"))


def test_picture_follows_the_colour_scheme_of_its_reader() -> None:
    style = drawn(SAVE).find(f"{SVG}style")
    assert style is not None and style.text is not None
    used = set(re.findall(r"var\(--([a-z-]+)\)", picture(SAVE, "t", "s").decode()))
    for name in used:
        assert style.text.count(f"--{name}:") == 2
