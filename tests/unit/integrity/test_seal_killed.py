"""Sealing that is killed leaves the snapshot as it was, and a whole seal or none."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyqmigrate.integrity.manifest import read_manifest
from pyqmigrate.integrity.verify import verify_seal
from tests.harness.sealed import Sealed
from tests.harness.snapshots import Bytes, load

ROOT = Path(__file__).parents[3]
SCRIPT = """
import dataclasses, itertools, sys
from pathlib import Path
from pyqmigrate import seal
from tests.harness.sealed import Sealed
path = Path(sys.argv[1])
made = dataclasses.replace(Sealed.make(path.with_name("model"), seal=None), path=path)
print("ready", flush=True)
for n in itertools.count():
    match sys.argv[2]:
        case "seal":
            seal(path, algorithm=("xxh3-128", "blake3")[n % 2])
        case "clear":
            made.seal.unlink(missing_ok=True)
            made.stale("big", 30)
            seal(path)
        case "save":
            Sealed.make(path, seal=("xxh3-128", None)[n % 2])
"""


def killed(path: Path, work: str, after: float, environment: dict[str, str]) -> None:
    """Does the work over and over in a child, which is killed ``after`` seconds."""
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path), work],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "ready\n"
        time.sleep(after)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL


def whole_or_absent(made: Sealed, big: Bytes) -> None:
    """The snapshot has what it had; its seal is absent, or whole and of this file."""
    assert (load(made.path)["big"] == big).all()
    check = verify_seal(made.path)  # raises for a seal that is not whole
    assert check is None or check.intact
    for entry in made.path.parent.iterdir():
        if entry.name not in ("guest", "guest.seal", "model"):
            # Linux cannot link over a name: killed between link and rename, what is finished
            # keeps its second name. What is not finished never has a name.
            assert entry.name.endswith(".partial")
            if entry.name.startswith(".guest.seal"):
                assert read_manifest(entry) is not None
            else:
                assert (load(entry)["big"] == big).all()
            entry.unlink()


def kill_rounds(disk: Path, work: str, rounds: int, environment: dict[str, str]) -> None:
    rng = random.Random(rounds)
    made = Sealed.make(disk / "guest")
    for n in range(rounds):
        if n % 2:
            made.seal.unlink(missing_ok=True)
        killed(made.path, work, rng.uniform(0, 0.08), environment)
        whole_or_absent(made, made.big)


@pytest.mark.parametrize("work", ["seal", "clear", "save"])
def test_a_killed_seal_leaves_the_snapshot_and_a_whole_seal_or_none(
    disk: Path, child_environment: dict[str, str], work: str
) -> None:
    kill_rounds(disk, work, 3, child_environment)


@pytest.mark.long
@pytest.mark.parametrize("work", ["seal", "clear", "save"])
def test_two_hundred_killed_seals_leave_the_snapshot_and_a_whole_seal_or_none(
    disk: Path, child_environment: dict[str, str], work: str
) -> None:
    kill_rounds(disk, work, 200, child_environment)
