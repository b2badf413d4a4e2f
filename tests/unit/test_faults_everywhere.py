"""System calls that fail at any place of any verb: nothing wrong is published, nothing is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate import NoSpace
from pyqmigrate.errors import target_error
from tests.harness.directories import directory_on_disk

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "harness" / "faults.c"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the shim with")
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, "-o", library, SOURCE, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def places() -> Iterator[list[Path]]:
    """A disk that takes direct I/O, and a file system in memory."""
    with directory_on_disk() as disk:
        memory = Path("/dev/shm") / disk.name
        memory.mkdir()
        yield [disk, memory, memory, memory]  # a disk takes its time for every fsync
        shutil.rmtree(memory)


def check(
    first: int, count: int, shim: Path, places: list[Path], environment: dict[str, str]
) -> None:
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.harness.faults",
            *map(str, places),
            "--first",
            str(first),
            "--count",
            str(count),
        ],
        cwd=ROOT,
        env=environment | {"LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    *found, met = [json.loads(line) for line in ran.stdout.splitlines()]
    assert sum(met.values()) == count
    assert len(met) > 15, f"few kinds of faults were met: {met}"
    assert met.get("none", 0) < count // 5, "few faults were met at all"
    if found:
        seed, name, fault, wrong = found[0]
        pytest.fail(f"{len(found)} of {count}, the first: {seed}, {name}, {fault}: {wrong}")


def test_a_failing_call_leaves_what_was_there_or_the_whole_result(
    shim: Path, places: list[Path], child_environment: dict[str, str]
) -> None:
    check(0, 64, shim, places, child_environment)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_the_errno_of_a_refusal_is_kept_by_what_it_ends(number: int) -> None:
    """A full quota was told as a full disk by unpack, and a full disk by seal as any failure."""
    error = target_error(OSError(number, os.strerror(number)), "cannot write", "/snap", position=8)
    assert (error.errno, error.filename, error.position) == (number, "/snap", 8)
    assert isinstance(error, NoSpace) == (number != errno.EIO)
    assert str(error).count(os.strerror(number)) == 1


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_thousand_failing_calls_leave_what_was_there_or_the_whole_result(
    shim: Path, places: list[Path], child_environment: dict[str, str]
) -> None:
    check(10_000, 2000, shim, places, child_environment)
