"""Standard descriptors that are closed: the exit code says what happened to the work."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pyqmigrate import open_snapshot
from tests.harness.command import COMMAND, make_snapshot, pages

CLOSED = [numbers for length in (1, 2, 3) for numbers in itertools.combinations((0, 1, 2), length)]
BIG = {"pc.ram": pages(90, 1)}

VERBS: dict[str, Callable[[Path], list[str]]] = {
    "pack": lambda d: ["pack", f"{d}/new", f"pc.ram={d}/ram", "--seal=sha256"],
    "unpack": lambda d: ["unpack", f"{d}/snap", f"{d}/raw"],
    "info": lambda d: ["info", f"{d}/snap", "--json"],
    "devices": lambda d: ["devices", f"{d}/snap"],
    "seal": lambda d: ["seal", f"{d}/snap"],
    "verify": lambda d: ["verify", f"{d}/snap"],
    "convert": lambda d: ["convert", f"{d}/snap", f"{d}/new", "--to", "stream"],
    "bench": lambda d: ["bench", "--size", "8MiB", "--dir", f"{d}", "--channels", "1"],
    "help": lambda d: ["--help"],
}
WRONG: dict[str, tuple[list[str], int]] = {
    "usage": (["pack", "--nonsense"], 2),
    "missing file": (["info", "/nonexistent/snap"], 3),
    "no snapshot": (["verify", os.devnull], 2),
}


def run_closed(arguments: list[str], closed: tuple[int, ...], environment: dict[str, str]) -> int:
    def close() -> None:
        for number in closed:
            os.close(number)

    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=close,
        env=environment,
    )
    process.communicate(timeout=120)
    return process.returncode


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def work(tmp_path: Path) -> Path:
    make_snapshot(tmp_path / "snap", BIG)
    (tmp_path / "ram").write_bytes(BIG["pc.ram"])
    return tmp_path


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_done_without_standard_streams(
    verb: str, work: Path, child_environment: dict[str, str]
) -> None:
    for closed in CLOSED if verb == "pack" else [(0, 1, 2)]:
        before = content(work)
        assert run_closed(VERBS[verb](work), closed, child_environment) == 0, closed
        after = content(work)
        assert {name: after[name] for name in before} == before
        if verb in ("pack", "convert"):
            with (
                open_snapshot(work / "new")
                if verb == "pack"
                else open_snapshot(work / "snap") as snapshot
            ):
                assert snapshot.blocks["pc.ram"].read(0, 90 * 4096) == BIG["pc.ram"]
        for name in set(after) - set(before):
            assert b"MiB/s" not in after[name] and b"Traceback" not in after[name]
            (work / name).unlink()


@pytest.mark.parametrize("what", WRONG)
def test_a_failure_has_its_code_without_standard_streams(
    what: str, child_environment: dict[str, str]
) -> None:
    arguments, code = WRONG[what]
    for closed in ((1,), (2,), (0, 1, 2)):
        assert run_closed(arguments, closed, child_environment) == code
        assert run_closed([*arguments, "--json"], closed, child_environment) == code


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, ["info", "-"]),
        (0, ["verify", "-"]),
        (0, ["devices", "-"]),
        (0, ["unpack", "-", "raw"]),
        (0, ["convert", "-", "new", "--to", "stream"]),
        (1, ["convert", "snap", "-", "--to", "stream"]),
        (1, ["convert", "snap", "-", "--to", "mapped-ram"]),
        (1, ["pack", "-", "pc.ram=ram"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_closed_stream_that_is_named_is_an_error(
    number: int, words: list[str], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into /dev/null, which takes its place, a stream went with exit code 0."""
    monkeypatch.chdir(work)
    process = subprocess.Popen(
        [*COMMAND, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: os.close(number),
        text=True,
    )
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert f"'-' is standard {('input', 'output')[number]}, which is closed" in error
