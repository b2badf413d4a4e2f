"""The timeline of a save of a running guest."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tests.harness.covering import covering
from tests.harness.json_page import assert_as_documented
from tests.harness.saving import source
from tests.harness.verbs import save

pytestmark = pytest.mark.qemu

# The options, and what there is of it besides the guest.
METHODS: dict[str, tuple[list[str], set[str]]] = {
    "direct": (["--engine", "direct"], {"device state", "write", "fsync", "verify", "name"}),
    "qemu": (["--engine", "qemu"], {"write pages and device state", "fsync", "verify", "name"}),
    "precopy": (
        ["--live", "--method", "precopy"],
        {"device state", "write, round 1", "compare and copy", "fsync", "name"},
    ),
    "converge": (["--live", "--method", "converge"], {"round 1", "fsync", "name"}),
    "background": (
        ["--live", "--method", "background"],
        {"write pages and device state", "complete", "name"},
    ),
}


@pytest.mark.parametrize("method", covering(METHODS, short=["direct", "precopy"]))
def test_timeline_has_the_pause_and_what_was_done(method: str, disk: Path) -> None:
    options, expected = METHODS[method]
    with source(disk, memory="memfd") as guest:
        data = save(
            guest.socket, disk / "snapshot", *options, "--timeline", str(disk / "timeline.svg")
        )
    assert_as_documented("vm save", data)
    phases: list[dict[str, Any]] = data["timeline"]
    assert expected <= {phase["name"] for phase in phases}
    assert all(0 <= phase["begins"] <= phase["ends"] for phase in phases)
    pauses = [phase["ends"] - phase["begins"] for phase in phases if phase["name"] == "stopped"]
    assert pauses[-1] == pytest.approx(data["downtime"], abs=1e-4)
    [title] = ET.parse(disk / "timeline.svg").getroot().findall("{http://www.w3.org/2000/svg}title")
    assert title.text is not None and title.text.startswith("Timeline: snapshot: ")
    assert data["timeline_picture"] == str(disk / "timeline.svg")


@pytest.mark.parametrize("name", ["timeline.png", "notes.svg"])
def test_picture_that_cannot_be_is_refused_before_the_save(name: str, disk: Path) -> None:
    (disk / "notes.svg").write_text("not a picture")
    with source(disk, memory="memfd") as guest:
        ran = subprocess.run(
            [
                sys.executable,
                "-m",
                "pyqmigrate",
                "vm",
                "save",
                "--qmp",
                str(guest.socket),
                str(disk / "snapshot"),
                "--timeline",
                str(disk / name),
            ],
            capture_output=True,
            text=True,
        )
        guest.assert_as_before()
    assert ran.returncode == 2
    assert name in ran.stderr
    assert not (disk / "snapshot").exists()
    assert (disk / "notes.svg").read_text() == "not a picture"
