"""Damaged files of every kind, under every verb: a result or an error of the package, soon and cheaply."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(first: int, count: int, directory: Path, environment: dict[str, str]) -> None:
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.harness.mutations",
            directory,
            "--first",
            str(first),
            "--count",
            str(count),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    *found, codes = [json.loads(line) for line in ran.stdout.splitlines()]
    if found:
        seed, kind, mutation, wrong = found[0]
        pytest.fail(f"{len(found)} of {count}, the first: {seed}, {kind}, {mutation}: {wrong}")
    ended = Counter[str]()
    for key, number in codes.items():
        ended[key.rpartition(": ")[2]] += number
    assert ended.total() > 3 * count
    assert ended["1"] > count, "the damage is too mild to prove anything"
    assert ended["0"] > count // 4, "the damage is too coarse to reach beyond the head"


def test_every_verb_ends_with_a_damaged_file(shm: Path, child_environment: dict[str, str]) -> None:
    check(0, 60, shm, child_environment)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_every_verb_ends_with_five_thousand_damaged_files(
    shm: Path, child_environment: dict[str, str]
) -> None:
    check(10_000, 5000, shm, child_environment)
