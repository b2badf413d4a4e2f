"""Exit codes, JSON and standard streams, whatever the verb."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path

import pytest

import pyqmigrate
from pyqmigrate.cli.exit_codes import ExitCode, exit_code
from pyqmigrate.errors import QemuError
from tests.harness.command import COMMAND, Command, child

VERBS = ("demo", "pack", "unpack", "info", "seal", "verify", "bench")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (pyqmigrate.SnapshotError("x"), 1),
        (pyqmigrate.UsageError("x"), 2),
        (pyqmigrate.BlockMismatch("x"), 2),
        (pyqmigrate.TargetError(errno.EIO, "x"), 3),
        (pyqmigrate.NoSpace("x"), 3),
        (pyqmigrate.DirectIORefused(errno.EINVAL, "x"), 3),
        (PermissionError(errno.EACCES, "x"), 3),
        (MemoryError(), 3),
        (pyqmigrate.GuestMemoryError(errno.EFAULT, "x"), 4),
        (QemuError("x"), 4),
        (pyqmigrate.NotSupported("x"), 5),
        (pyqmigrate.Cancelled("x"), 130),
        (KeyboardInterrupt(), 130),
        (AssertionError(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_error_has_its_exit_code(error: BaseException, code: int | None) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_mentions_json(verb: str, command: Command) -> None:
    ran = command(verb, "--help")
    assert ran.code == ExitCode.DONE
    assert "--json" in ran.out
    assert "JSON:" in ran.out


@pytest.mark.parametrize("verb", ["pack", "unpack", "info", "seal", "verify"])
def test_verb_with_a_snapshot_takes_an_offset(verb: str, command: Command) -> None:
    assert "--offset SIZE" in command(verb, "--help").out


def test_help_lists_the_verbs_and_exit_codes(command: Command) -> None:
    text = command("--help").out
    assert all(f"\n    {verb} " in text for verb in VERBS)
    assert "130 interrupted" in text


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("frobnicate",),
        ("info",),
        ("info", "--nope", "x"),
        ("verify", "x", "--offset", "1GB"),
        ("pack", "x", "no-equals-sign"),
        ("pack", "x", "=file"),
        ("pack", "x", "name="),
        ("pack", "x", "a=b", "--seal=md5"),
        ("seal", "x", "--algorithm", "md5"),
        ("seal",),
        ("pack", "x", "a=b", "--channels", "0"),
        ("pack", "x", "a=b", "--sparse", "maybe"),
        ("bench", "--channels", "1,,2"),
        ("demo", "--size", "5000"),
        ("demo", "--size", "1MiB"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_and_prints_nothing_to_stdout(
    arguments: tuple[str, ...], command: Command
) -> None:
    ran = command(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1].startswith("pyqmigrate: ")


def test_wrong_usage_is_json_when_json_is_asked_for(command: Command) -> None:
    ran = command("verify", "--json")
    assert ran.code == 2
    assert ran.json["error"]["exit_code"] == 2
    assert "SNAPSHOT" in ran.json["error"]["message"]
    assert "usage: pyqmigrate verify" in ran.err


def test_json_after_two_dashes_is_a_name_and_not_an_option(command: Command) -> None:
    ran = command("verify", "--", "--json")
    assert (ran.code, ran.out) == (3, "")


def test_missing_file_is_refused_by_the_system(tmp_path: Path, command: Command) -> None:
    ran = command("info", tmp_path / "nowhere", "--json")
    assert ran.code == 3
    error = ran.json["error"]
    assert error["errno"] == errno.ENOENT
    assert error["filename"] == str(tmp_path / "nowhere")
    assert error["message"] in ran.err


def test_bad_snapshot_is_named_with_field_and_offset(snapshot: Path, command: Command) -> None:
    with snapshot.open("r+b") as file:
        file.write(b"NOPE")
    ran = command("info", snapshot, "--json")
    assert ran.code == 1
    assert ran.json["error"]["type"] == "SnapshotError"
    assert ran.json["error"]["field"] == "magic"
    assert ran.json["error"]["offset"] == 0
    assert str(snapshot) in ran.err


def test_json_comes_alone_on_stdout(snapshot: Path, child_environment: dict[str, str]) -> None:
    ran = child("info", snapshot, "--json", environment=child_environment)
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["machine"] == "pc-q35-10.0"
    assert ran.stderr == ""


def test_reader_that_goes_away_is_harmless(
    snapshot: Path, child_environment: dict[str, str]
) -> None:
    process = subprocess.Popen(
        [*COMMAND, "info", snapshot],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=child_environment,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


def test_output_that_cannot_be_written_is_refused_by_the_system(
    snapshot: Path, child_environment: dict[str, str]
) -> None:
    with Path("/dev/full").open("wb") as full:
        ran = subprocess.run(
            [*COMMAND, "info", snapshot],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment,
            timeout=60,
        )
    assert ran.returncode == 3
    assert ran.stderr == "pyqmigrate: No space left on device: '<stdout>'\n"


def test_names_outside_the_encoding_of_stdout_are_escaped(
    tmp_path: Path, snapshot: Path, child_environment: dict[str, str]
) -> None:
    renamed = snapshot.rename(tmp_path / "gäst")
    ascii_only = child_environment | {"PYTHONIOENCODING": "ascii:strict"}
    ran = child("verify", renamed, environment=ascii_only)
    assert ran.returncode == 0
    assert r"g\xe4st" in ran.stdout
