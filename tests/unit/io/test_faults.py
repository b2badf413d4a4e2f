"""System calls that are interrupted, cut short or refused, in a child with a preloaded shim."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "harness/odd_transfers.c"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the shim with")
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", library, SOURCE, "-ldl"], check=True
    )
    return library


@pytest.fixture(params=["queue", "no queue"])
def child_environment(
    request: pytest.FixtureRequest, child_environment: dict[str, str]
) -> dict[str, str]:
    """With native AIO, and without it as in a container that forbids it."""
    return {**child_environment, "QUEUE": "on" if request.param == "queue" else "off"}


def run(
    shim: Path,
    disk: Path,
    environment: dict[str, str],
    fault: str,
    direct_io: str,
    page_size: int = 4096,
) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tests.harness.faulty", disk, direct_io, str(page_size)],
        env={**environment, "LD_PRELOAD": str(shim), "FAULT": fault},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# With direct I/O the first call is the trial of it.
AFTER_TRIAL = {"on": 2, "off": 1}


@pytest.mark.parametrize("direct_io", ["on", "off"])
@pytest.mark.parametrize(
    ("mode", "every"), [("eintr", 2), ("eagain", 2), ("short", 1), ("short", 3), ("odd", 2)]
)
@pytest.mark.parametrize("kind", ["write", "read"])
def test_transfers_that_stop_midway_are_taken_up_again(
    shim: Path,
    disk: Path,
    child_environment: dict[str, str],
    kind: str,
    mode: str,
    every: int,
    direct_io: str,
) -> None:
    fault = f"{kind},{mode},{AFTER_TRIAL[direct_io]},{every}"
    result = run(shim, disk, child_environment, fault, direct_io)
    assert result["save"]["error"] is None, result
    assert result["load"]["error"] is None, result
    assert result["equal"]


@pytest.mark.parametrize("mode", ["short", "odd"])
def test_small_pages_that_stop_midway_are_taken_up_again(
    shim: Path, disk: Path, child_environment: dict[str, str], mode: str
) -> None:
    for kind in ("write", "read"):
        result = run(shim, disk, child_environment, f"{kind},{mode},2,1", "on", 1024)
        assert result["equal"], result


@pytest.mark.parametrize("direct_io", ["on", "off"])
@pytest.mark.parametrize("call", [0, 2])
@pytest.mark.parametrize(
    ("mode", "kind", "number"), [("eio", "TargetError", 5), ("enospc", "NoSpace", 28)]
)
def test_a_write_that_is_refused_ends_the_save_and_leaves_nothing(
    shim: Path,
    disk: Path,
    child_environment: dict[str, str],
    mode: str,
    kind: str,
    number: int,
    call: int,
    direct_io: str,
) -> None:
    fault = f"write,{mode},{AFTER_TRIAL[direct_io] + call},1"
    result = run(shim, disk, child_environment, fault, direct_io)
    assert result["save"]["error"] == kind
    assert result["save"]["errno"] == number
    assert result["save"]["position"] >= 1 << 20
    assert result["names"] == []


@pytest.mark.parametrize("direct_io", ["on", "off"])
def test_a_read_that_is_refused_ends_the_load(
    shim: Path, disk: Path, child_environment: dict[str, str], direct_io: str
) -> None:
    result = run(shim, disk, child_environment, f"read,eio,{AFTER_TRIAL[direct_io]},1", direct_io)
    assert result["load"]["error"] == "TargetError"
    assert result["load"]["errno"] == 5
    assert result["load"]["position"] >= 1 << 20


@pytest.mark.parametrize("direct_io", ["on", "off"])
def test_an_early_end_of_the_file_is_a_snapshot_error(
    shim: Path, disk: Path, child_environment: dict[str, str], direct_io: str
) -> None:
    result = run(shim, disk, child_environment, f"read,end,{AFTER_TRIAL[direct_io]},1", direct_io)
    assert result["load"]["error"] == "SnapshotError"
    assert "truncated" in result["load"]["text"]
