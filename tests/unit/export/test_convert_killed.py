"""A conversion that is killed leaves its source whole, and its target absent or whole."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyqmigrate import RamBlock, convert, open_snapshot, save
from tests.harness.physical import Physical
from tests.harness.snapshots import known_memory

ROOT = Path(__file__).parents[3]
FORMS = ["mapped-ram", "stream", "raw", "elf", "lime"]
FILES = [form for form in FORMS if form != "raw"]
IMAGES = {"elf": Physical.of_elf, "lime": Physical.of_lime}
MACHINE = "pc-q35-10.0"
PLACES = ["a@0", "b@0x1000000"]
# The child converts two snapshots in turn, each time to a new name, or over the last result.
SCRIPT = """
import itertools, sys
from pathlib import Path
from pyqmigrate import convert
from pyqmigrate.format.address_space.physical_map import parse_placement
directory, to, over = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "over"
places = [parse_placement(text) for text in sys.argv[4:]]
print("ready", flush=True)
for n in itertools.count():
    target = directory / "to" / ("s" if over else str(n))
    convert(directory / f"from{n % 2}", target, to=to, placements=places)
"""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sources(disk: Path, to: str) -> list[str]:
    """Two snapshots of the form that ``to`` is not, with two blocks; their digests."""
    for seed in (0, 1):
        path = disk / f"from{seed}"
        blocks = [RamBlock(name, known_memory(seed + place)) for place, name in enumerate("ab")]
        if to == "mapped-ram":
            save(disk / "first", blocks, machine=MACHINE)
            convert(disk / "first", path, to="stream")
            (disk / "first").unlink()
        else:
            save(path, blocks, machine=MACHINE)
    return [digest(disk / f"from{seed}") for seed in (0, 1)]


def killed(disk: Path, to: str, mode: str, environment: dict[str, str]) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, disk, to, mode, *(PLACES if to in IMAGES else [])],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0.005, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL


def assert_whole(path: Path, to: str) -> None:
    if to in IMAGES:
        found = [*IMAGES[to](path).all().values()]
    else:
        with open_snapshot(path) as snapshot:
            snapshot.verify()
            found = [block.read(0, block.length) for block in snapshot.blocks.values()]
    assert found in [[known_memory(seed + place).tobytes() for place in (0, 1)] for seed in (0, 1)]


def assert_whole_files(directory: Path) -> None:
    """What has a name is whole; with the list of them, none is missing."""
    seeds = {
        name: {known_memory(seed + place).tobytes(): seed for seed in (0, 1)}
        for place, name in enumerate(("a.raw", "b.raw"))
    }
    found = {path.name: path for path in directory.iterdir()}
    told = {seeds[name][found[name].read_bytes()] for name in seeds if name in found}
    assert len(told) <= 1
    if "blocks.json" in found:
        listed = json.loads(found["blocks.json"].read_text())["blocks"]
        assert {block["file"] for block in listed} == set(seeds) <= set(found)
    assert set(found) <= {*seeds, "blocks.json"}


def kill_rounds(disk: Path, to: str, mode: str, rounds: int, environment: dict[str, str]) -> None:
    random.seed(f"{to} {mode} {rounds}")
    before = sources(disk, to)
    for _ in range(rounds):
        (disk / "to").mkdir()
        killed(disk, to, mode, environment)
        for path in (disk / "to").iterdir():
            # Linux cannot link over a name: killed between link and rename, what is finished
            # keeps its second name.
            assert path.name.isalnum() or (mode == "over" and path.name.endswith(".partial"))
            if to == "raw":
                assert_whole_files(path)
            else:
                assert_whole(path, to)
            remove(path)
        (disk / "to").rmdir()
        assert [digest(disk / f"from{seed}") for seed in (0, 1)] == before


def remove(path: Path) -> None:
    if path.is_dir():
        for entry in path.iterdir():
            entry.unlink()
        path.rmdir()
    else:
        path.unlink()


@pytest.mark.parametrize("to", FORMS)
def test_a_killed_conversion_leaves_whole_files(
    disk: Path, to: str, child_environment: dict[str, str]
) -> None:
    kill_rounds(disk, to, "new", 3, child_environment)


@pytest.mark.parametrize("to", FILES)
def test_a_killed_conversion_over_a_file_leaves_the_old_or_the_new(
    disk: Path, to: str, child_environment: dict[str, str]
) -> None:
    kill_rounds(disk, to, "over", 3, child_environment)


@pytest.mark.long
@pytest.mark.parametrize(
    ("to", "mode"), [*((form, "new") for form in FORMS), *((form, "over") for form in FILES)]
)
def test_sixty_killed_conversions_leave_whole_files(
    disk: Path, to: str, mode: str, child_environment: dict[str, str]
) -> None:
    kill_rounds(disk, to, mode, 60, child_environment)
