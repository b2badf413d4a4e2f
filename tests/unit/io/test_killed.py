"""A save that is killed leaves what was there, whole, and nothing else."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness.snapshots import known_memory, load, save_known

ROOT = Path(__file__).parents[3]
SCRIPT = """
import itertools, sys
import pyqmigrate
from tests.harness.snapshots import known_memory
blocks = [[pyqmigrate.RamBlock("ram", known_memory(seed))] for seed in (1, 2)]
print("ready", flush=True)
for n in itertools.count():
    pyqmigrate.save(sys.argv[1], blocks[n % 2], reuse=sys.argv[2] == "reuse")
"""


def killed(path: Path, mode: str, after: float, environment: dict[str, str]) -> None:
    """Saves to ``path`` over and over in a child, which is killed ``after`` seconds."""
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path), mode],
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


def kill_rounds(disk: Path, rounds: int, environment: dict[str, str]) -> None:
    random.seed(rounds)
    seen = []
    contents = [known_memory(seed).tobytes() for seed in (0, 1, 2)]
    for _ in range(rounds):
        save_known(disk / "snap", seed=0)
        killed(disk / "snap", "replace", random.uniform(0, 0.06), environment)
        seen.append(contents.index(load(disk / "snap")["ram"].tobytes()))
        for entry in disk.iterdir():
            if entry.name != "snap":
                # Linux cannot link over a name: killed between link and rename, a finished
                # snapshot keeps its second name. What is not finished never has a name.
                assert entry.name.endswith(".partial")
                assert load(entry)["ram"].tobytes() in contents
                entry.unlink()
    assert set(seen) <= {0, 1, 2}


def test_a_killed_save_leaves_a_whole_file(disk: Path, child_environment: dict[str, str]) -> None:
    kill_rounds(disk, 5, child_environment)


@pytest.mark.long
def test_two_hundred_killed_saves_leave_whole_files(
    disk: Path, child_environment: dict[str, str]
) -> None:
    kill_rounds(disk, 200, child_environment)


def test_a_killed_first_save_leaves_nothing(disk: Path, child_environment: dict[str, str]) -> None:
    script = SCRIPT.replace("reuse=sys.argv[2]", "max_bandwidth=100000, reuse=sys.argv[2]")
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(disk / "snap"), "replace"],
        env=child_environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    with child.stdout:
        child.stdout.readline()
        time.sleep(0.2)
        child.kill()
        child.wait()
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("after", [0.0, 0.01, 0.03])
def test_a_killed_overwrite_is_whole_or_no_snapshot(
    disk: Path, child_environment: dict[str, str], after: float
) -> None:
    import pyqmigrate

    save_known(disk / "snap", seed=0)
    killed(disk / "snap", "reuse", after, child_environment)
    try:
        content = load(disk / "snap")["ram"].tobytes()
    except pyqmigrate.SnapshotError:
        return
    assert content in [known_memory(seed).tobytes() for seed in (0, 1, 2)]
