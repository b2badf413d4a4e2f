"""The page to zoom in, in a headless browser."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pyqmigrate import RamBlock, open_snapshot, save
from pyqmigrate.analysis import Extent, memory_map
from pyqmigrate.analysis.picture import html
from pyqmigrate.analysis.picture.file import PictureForm, check_place, write_picture
from tests.harness.browser import Browser, Page
from tests.harness.increment_files import save_base

PAGE = 4096
NPAGES = 20000


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A guest, and the same one with 300 other pages."""
    directory = tmp_path_factory.mktemp("snapshots")
    rng = np.random.default_rng(3)
    pages = np.zeros((NPAGES, PAGE), dtype=np.uint8)
    pages[:600] = rng.integers(0, 256, (600, PAGE))
    pages[600:1200] = rng.integers(0, 4, (600, PAGE))
    pages[1200:1500] = 0x55
    pages[0, :26] = np.frombuffer(b"The first page of a guest.", dtype=np.uint8)
    save_base(directory / "monday", {"pc.ram": pages.reshape(-1)})
    pages[800:1100] ^= 3
    save_base(directory / "tuesday", {"pc.ram": pages.reshape(-1)})
    return directory / "monday", directory / "tuesday"


def write(target: Path, a: Path, b: Path | None = None, extent: Extent | None = None) -> Path:
    place = check_place(target, PictureForm.HTML)
    with open_snapshot(a) as snapshot:
        found = memory_map(snapshot, b, by="block", cells=1 << 21)
        write_picture(place, PictureForm.HTML, found, snapshot, extent=extent)
    return place


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def page_file(snapshots: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("page") / "map.html", snapshots[1], snapshots[0])


def state(page: Page) -> dict[str, object]:
    return dict(json.loads(page.evaluate("JSON.stringify(memoryMap.state())")))


def colours(page: Page) -> int:
    """How many colours the window has that cover more than a few pixels: none is an empty page."""
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(page.screenshot()))
    return sum(1 for number, _ in image.convert("RGB").getcolors(1 << 24) if number > 200)


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (760, 900)])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_whole_guest_is_seen_without_an_error_or_another_file(
    browser: Browser, page_file: Path, width: int, height: int, dark: bool
) -> None:
    with browser.open(page_file, width, height, dark=dark) as page:
        assert colours(page) > 8
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.getElementById('title').textContent").endswith("tuesday")
        assert page.errors() == []
        assert page.requests() == [page_file.as_uri()]


def test_one_zooms_from_the_whole_guest_to_a_page(browser: Browser, page_file: Path) -> None:
    with browser.open(page_file, 1280, 800) as page:
        before = state(page)
        assert before["tile"] != "4 KiB"
        shot = page.screenshot()
        for _ in range(20):
            page.wheel(400, 300, -100, control=True)
        page.wait_for("memoryMap.state().tile === '4 KiB' && memoryMap.state().zoom < 0")
        assert page.screenshot() != shot
        page.evaluate("document.getElementById('whole').click()")
        assert state(page) == before
        assert page.errors() == []


def test_a_click_shows_the_bytes_of_a_page(browser: Browser, page_file: Path) -> None:
    with browser.open(page_file, 1280, 800, "#at=pc.ram:0x0&zoom=-2") as page:
        page.wait_for("!!document.querySelector('#detail pre')")
        text = page.evaluate("document.querySelector('#detail').textContent")
        assert "The firs" in text
        assert "54 68 65 20" in text
        box = page.evaluate(
            "(() => { const b = document.getElementById('tiles').getBoundingClientRect();"
            " return [b.left, b.top]; })()"
        )
        page.click(box[0] + 112 + 60, box[1] + 40)
        page.wait_for("memoryMap.state().selected === '0x1000'")
        assert page.errors() == []


def test_an_address_that_is_typed_is_shown(browser: Browser, page_file: Path) -> None:
    with browser.open(page_file, 1280, 800) as page:
        page.evaluate(
            "document.getElementById('address').value = 'pc.ram:0x320000';"
            "document.querySelector('#go button').click()"
        )
        page.wait_for(
            "memoryMap.state().selected === '0x320000' && !!document.querySelector('#detail dl')"
        )
        text = page.evaluate("document.querySelector('#detail').textContent")
        assert re.search(r"changed\s*yes", text)
        assert page.errors() == []


def test_a_page_that_is_not_in_the_file_says_so(
    browser: Browser, snapshots: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "FIRST_BYTES", 8 * PAGE)
    place = write(tmp_path / "map.html", snapshots[0])
    with browser.open(place, 1280, 800, f"#at=pc.ram:{100 * PAGE:#x}") as page:
        page.wait_for("!!document.querySelector('#detail dl')")
        assert "not in this file" in page.evaluate("document.querySelector('#detail').textContent")
        assert "first 32 KiB" in page.evaluate("document.querySelector('#about').textContent")


def test_a_name_cannot_become_a_part_of_the_page(browser: Browser, tmp_path: Path) -> None:
    name = "</script><img src=x onerror=alert(1)>"
    save(tmp_path / "guest", [RamBlock(name, bytes(range(256)) * 160)])
    place = write(tmp_path / "map.html", tmp_path / "guest")
    with browser.open(place, 1280, 800) as page:
        assert page.evaluate("document.images.length") == 0
        assert page.errors() == []


def test_the_bytes_of_a_range_and_no_others_are_in_the_file(
    snapshots: tuple[Path, Path], tmp_path: Path
) -> None:
    whole = write(tmp_path / "whole", snapshots[0]).stat().st_size
    extent = Extent(10 * PAGE, 20 * PAGE, "pc.ram")
    part = write(tmp_path / "part", snapshots[0], extent=extent).read_text()
    data = json.loads(re.search(r'id="map">(.*)</script>', part)[1])  # type: ignore[index]
    assert data["bytes"]["pieces"] == [[0, hex(10 * PAGE), 10 * PAGE]]
    assert len(part) < whole - 500 * PAGE


def test_no_more_bytes_than_the_limit_are_in_the_file(
    snapshots: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "BYTES_MAX", 5 * PAGE)
    text = write(tmp_path / "map", snapshots[0], extent=Extent(0, 1 << 40, "pc.ram")).read_text()
    data = json.loads(re.search(r'id="map">(.*)</script>', text)[1])  # type: ignore[index]
    assert data["bytes"]["pieces"] == [[0, "0x0", 5 * PAGE]]
    assert not data["bytes"]["complete"]
