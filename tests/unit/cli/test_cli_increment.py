"""Every verb that reads a snapshot reads an increment, and finds its base where --base says."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pyqmigrate import open_snapshot, seal
from pyqmigrate.format.device.sections import DeviceSection, encode_devices
from tests.harness.command import Command
from tests.harness.device_example import BODY, RTC
from tests.harness.increment_files import save_base, save_increment
from tests.harness.json_page import assert_as_documented
from tests.harness.snapshots import ram

SECTIONS, DESCRIPTION = encode_devices([DeviceSection("rtc", BODY, 0, 3, RTC)], 4096)


@pytest.fixture
def step(shm: Path) -> Path:
    """An increment with a page of ram changed and all of video, beside its sealed base."""
    old, video = ram(100, density=1), ram(10, density=1, seed=1)
    new = old.copy()
    new[:4096] = 7
    changed = np.zeros(100, bool)
    changed[0] = True
    save_base(shm / "base", {"ram": old, "video": video})
    seal(shm / "base")
    save_increment(
        shm / "step",
        shm / "base",
        {"ram": new, "video": video},
        {"ram": changed},
        sections=SECTIONS,
        description=DESCRIPTION,
    )
    return shm / "step"


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("info", []),
        ("verify", ["--deep"]),
        ("devices", []),
        ("unpack", ["{new}"]),
        ("convert", ["{new}", "--to", "mapped-ram"]),
        ("convert", ["{new}", "--to", "stream"]),
        ("convert", ["{new}", "--to", "raw"]),
        ("convert", ["{new}", "--to", "lime"]),
    ],
)
def test_verbs_read_an_increment_wherever_its_base_is(
    step: Path, command: Command, verb: str, arguments: list[str]
) -> None:
    words = [word.format(new=step.with_name("new")) for word in arguments]
    map_ = ["--map", "ram@0"] if "lime" in words else []
    ran = command(verb, step, *words, *map_, "--json")
    assert ran.code == 0, ran.err
    assert_as_documented(verb, ran.json)
    for name in ("base", "base.seal"):
        step.with_name(name).rename(step.with_name(f"moved{name[4:]}"))
    words = [word.replace("/new", "/again") for word in words]
    if verb != "devices":  # the device state is in the increment
        ran = command(verb, step, *words, *map_)
        assert ran.code != 0
        assert "base" in ran.err and "--base PATH" in ran.err
    ran = command(verb, step, *words, *map_, "--base", step.with_name("moved"))
    assert ran.code == 0, ran.err


def test_info_shows_the_base_and_its_share(step: Path, command: Command) -> None:
    ran = command("info", step)
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert f"base {step.with_name('base')}" in lines
    assert "increment 11 pages, 44.0 KiB, 10.0% of the base's data" in lines
    found = command("info", step, "--json").json
    increment = found["increment"]
    assert found["kind"] == "increment" and not found["loadable"]
    assert increment["changed_blocks"] == {"ram": 1, "video": 10}
    assert increment["recorded_base"] == "base"
    assert increment["base_identity"]["seal"]
    [block] = [block for block in found["blocks"] if block["name"] == "ram"]
    assert (block["data_pages"], block["zero_pages"]) == (100, 0)


def test_verify_compares_the_base_with_its_seal(step: Path, command: Command) -> None:
    ran = command("verify", step, "--json")
    assert ran.code == 0 and ran.json["base_seal"]["intact"] and ran.json["seal"] is None
    base = step.with_name("base")
    info = base.stat()
    with base.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"?")
    os.utime(base, ns=(info.st_atime_ns, info.st_mtime_ns))
    ran = command("verify", step, "--json")
    assert ran.code == 1 and not ran.json["valid"]
    assert not ran.json["base_seal"]["intact"]
    assert_as_documented("verify", ran.json)


def test_a_flattened_increment_needs_no_base(step: Path, command: Command) -> None:
    whole = step.with_name("whole")
    assert command("convert", step, whole, "--to", "mapped-ram").code == 0
    with open_snapshot(step) as snapshot:
        expected = snapshot.blocks["ram"].read(0, 100 * 4096)
    step.with_name("base").unlink()
    with open_snapshot(whole) as snapshot:
        assert snapshot.blocks["ram"].read(0, 100 * 4096) == expected
        assert [section.name for section in snapshot.stream.sections][-1] == "rtc"


def test_convert_does_not_offer_increments(step: Path, command: Command) -> None:
    ran = command("convert", step, step.with_name("new"), "--to", "increment")
    assert ran.code == 2 and "invalid choice" in ran.err
