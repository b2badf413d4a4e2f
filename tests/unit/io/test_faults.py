"""System calls that are interrupted, cut short or refused, in a child with a preloaded shim."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "harness/odd_transfers.c"


class Shimmed:
    """The program of ``tests.harness.faulty`` under the shim; each trial is in a process of its own."""

    def __init__(self, shim: Path, environment: dict[str, str], queue: str) -> None:
        self.queue = queue
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.faulty"],
            env={**environment, "LD_PRELOAD": str(shim)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )

    def run(self, disk: Path, fault: str, direct_io: str, page_size: int = 4096) -> Any:
        trial = {
            "directory": str(disk),
            "direct_io": direct_io,
            "page_size": page_size,
            "environment": {"FAULT": fault, "QUEUE": self.queue},
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(trial) + "\n")
        self.process.stdin.flush()
        result = json.loads(self.process.stdout.readline())
        assert "code" not in result, result
        return result

    def close(self) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(60)


@pytest.fixture(scope="module", params=["queue", "no queue"])
def shimmed(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    child_environment: dict[str, str],
) -> Iterator[Shimmed]:
    """With native AIO, and without it as in a container that forbids it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the shim with")
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", library, SOURCE, "-ldl"], check=True
    )
    started = Shimmed(library, child_environment, "on" if request.param == "queue" else "off")
    yield started
    started.close()


# With direct I/O the first call is the trial of it.
AFTER_TRIAL = {"on": 2, "off": 1}


@pytest.mark.parametrize("direct_io", ["on", "off"])
@pytest.mark.parametrize(
    ("mode", "every"), [("eintr", 2), ("eagain", 2), ("short", 1), ("short", 3), ("odd", 2)]
)
@pytest.mark.parametrize("kind", ["write", "read"])
def test_transfers_that_stop_midway_are_taken_up_again(
    shimmed: Shimmed, disk: Path, kind: str, mode: str, every: int, direct_io: str
) -> None:
    fault = f"{kind},{mode},{AFTER_TRIAL[direct_io]},{every}"
    result = shimmed.run(disk, fault, direct_io)
    assert result["save"]["error"] is None, result
    assert result["load"]["error"] is None, result
    assert result["equal"]


@pytest.mark.parametrize("mode", ["short", "odd"])
def test_small_pages_that_stop_midway_are_taken_up_again(
    shimmed: Shimmed, disk: Path, mode: str
) -> None:
    for kind in ("write", "read"):
        result = shimmed.run(disk, f"{kind},{mode},2,1", "on", 1024)
        assert result["equal"], result


@pytest.mark.parametrize("direct_io", ["on", "off"])
@pytest.mark.parametrize("call", [0, 2])
@pytest.mark.parametrize(
    ("mode", "kind", "number"), [("eio", "TargetError", 5), ("enospc", "NoSpace", 28)]
)
def test_a_write_that_is_refused_ends_the_save_and_leaves_nothing(
    shimmed: Shimmed, disk: Path, mode: str, kind: str, number: int, call: int, direct_io: str
) -> None:
    fault = f"write,{mode},{AFTER_TRIAL[direct_io] + call},1"
    result = shimmed.run(disk, fault, direct_io)
    assert result["save"]["error"] == kind
    assert result["save"]["errno"] == number
    assert result["save"]["position"] >= 1 << 20
    assert result["names"] == []


@pytest.mark.parametrize("direct_io", ["on", "off"])
def test_a_read_that_is_refused_ends_the_load(shimmed: Shimmed, disk: Path, direct_io: str) -> None:
    result = shimmed.run(disk, f"read,eio,{AFTER_TRIAL[direct_io]},1", direct_io)
    assert result["load"]["error"] == "TargetError"
    assert result["load"]["errno"] == 5
    assert result["load"]["position"] >= 1 << 20


@pytest.mark.parametrize("direct_io", ["on", "off"])
def test_an_early_end_of_the_file_is_a_snapshot_error(
    shimmed: Shimmed, disk: Path, direct_io: str
) -> None:
    result = shimmed.run(disk, f"read,end,{AFTER_TRIAL[direct_io]},1", direct_io)
    assert result["load"]["error"] == "SnapshotError"
    assert "truncated" in result["load"]["text"]
