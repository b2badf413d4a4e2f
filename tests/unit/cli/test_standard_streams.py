"""``-`` is standard input and output in every verb where it can be."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pyqmigrate import convert
from tests.harness.command import COMMAND, Command, pages

READERS = ("info", "verify", "devices", "unpack", "convert")


@pytest.fixture
def stream(tmp_path: Path, snapshot: Path) -> Path:
    convert(snapshot, tmp_path / "stream", to="stream")
    return tmp_path / "stream"


def piped(*words: str | Path, data: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *map(str, words)], input=data, capture_output=True, timeout=60)


def more(verb: str, to: Path) -> list[str | Path]:
    return {"unpack": [to], "convert": [to, "--to", "mapped-ram"]}.get(verb, [])


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("verb", READERS)
def test_verb_reads_a_pipe(verb: str, pack: object, stream: Path, tmp_path: Path) -> None:
    ran = piped(verb, "-", *more(verb, tmp_path / "to"), "--json", data=pack(stream.read_bytes()))
    assert (ran.returncode, ran.stderr) == (0, b"")
    data = json.loads(ran.stdout)
    assert data["snapshot"] == "-"
    named = subprocess.run(
        [*COMMAND, verb, str(stream), *map(str, more(verb, tmp_path / "other")), "--json"],
        capture_output=True,
        check=True,
    )
    expected = json.loads(named.stdout)
    for key in ("blocks", "data_pages", "zero_pages", "devices", "total_ram"):
        if verb != "convert" or key != "blocks":
            assert data.get(key) == expected.get(key)


@pytest.mark.parametrize("verb", READERS)
def test_verb_reads_a_file_that_is_redirected(verb: str, snapshot: Path, tmp_path: Path) -> None:
    with snapshot.open("rb") as file:
        ran = subprocess.run(
            [*COMMAND, verb, "-", *map(str, more(verb, tmp_path / "to"))],
            stdin=file,
            capture_output=True,
            timeout=60,
        )
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_redirected_file_is_read_from_its_present_position(stream: Path, tmp_path: Path) -> None:
    (tmp_path / "shifted").write_bytes(b"x" * 777 + stream.read_bytes())
    with (tmp_path / "shifted").open("rb") as file:
        os.lseek(file.fileno(), 777, os.SEEK_SET)
        ran = subprocess.run([*COMMAND, "verify", "-"], stdin=file, capture_output=True)
    assert ran.returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        ("seal", "-"),
        ("unpack", "snapshot", "-"),
        ("vm", "save", "--qmp", "nowhere", "-"),
        ("pack", "-", "ram=memory"),
        ("convert", "snapshot", "-", "--to", "raw"),
        ("convert", "snapshot", "-", "--to", "elf"),
        ("convert", "snapshot", "-", "--to", "mapped-ram"),
    ],
    ids=" ".join,
)
def test_verb_that_cannot_use_a_pipe_says_why(
    words: tuple[str, ...], tmp_path: Path, snapshot: Path
) -> None:
    (tmp_path / "memory").write_bytes(pages(3))
    snapshot.rename(tmp_path / "snapshot")
    ran = subprocess.run([*COMMAND, *words], capture_output=True, cwd=tmp_path, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "'-'" in ran.stderr
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize("json_option", [(), ("--json",)], ids=["text", "json"])
def test_stream_goes_to_a_pipe_and_nothing_else_does(
    snapshot: Path, stream: Path, json_option: tuple[str, ...]
) -> None:
    ran = piped("convert", snapshot, "-", "--to", "stream", *json_option, data=b"")
    assert ran.returncode == 0
    assert ran.stdout == stream.read_bytes()
    if json_option:
        report = json.loads(ran.stderr)
        size = len(ran.stdout)
        assert (report["file_size"], report["bytes_written"]) == (size, size)
        assert (report["target"], report["bytes_allocated"]) == ("-", 0)
    else:
        assert b"6.0 KiB" not in ran.stdout
        assert b"data pages" in ran.stderr


def test_stream_goes_to_a_socket(snapshot: Path, stream: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [*COMMAND, "convert", str(snapshot), "-", "--to", "stream"],
            stdout=theirs,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        with ours.makefile("rb") as file:
            assert file.read() == stream.read_bytes()
    assert process.wait(60) == 0


def test_failure_while_a_pipe_is_filled_is_an_error_on_stderr(snapshot: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "convert", str(snapshot), "-", "--to", "stream", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 3
    assert '"errno": 32' in error


def test_interrupt_ends_a_stream_that_no_process_reads(tmp_path: Path) -> None:
    """A pipe holds 64 KiB: the writer waits, and still hears the signal."""
    memory = tmp_path / "memory"
    memory.write_bytes(pages(2000, 4))
    subprocess.run(
        [*COMMAND, "pack", str(tmp_path / "s"), f"ram={memory}"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    process = subprocess.Popen(
        [*COMMAND, "convert", str(tmp_path / "s"), "-", "--to", "stream"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(4) == b"QEVM"
    process.terminate()
    assert process.wait(60) == 130
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()


@pytest.mark.parametrize("form", ["mapped-ram", "stream", "lime"])
def test_form_goes_into_the_file_that_stdout_is_redirected_to(
    snapshot: Path, tmp_path: Path, command: Command, form: str
) -> None:
    words = ["convert", str(snapshot), "--to", form, "--map", "pc.ram@0"]
    words = words if form == "lime" else words[:4]
    assert command(*words[:2], tmp_path / "named", *words[2:]).code == 0
    with (tmp_path / "redirected").open("wb") as file:
        ran = subprocess.run(
            [*COMMAND, *words[:2], "-", *words[2:]], stdout=file, stderr=subprocess.PIPE
        )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "redirected").read_bytes() == (tmp_path / "named").read_bytes()


def test_pack_writes_into_the_file_that_stdout_is_redirected_to(
    tmp_path: Path, command: Command
) -> None:
    (tmp_path / "memory").write_bytes(pages(3))
    with (tmp_path / "s").open("wb") as file:
        subprocess.run(
            [*COMMAND, "pack", "-", f"ram={tmp_path}/memory"],
            stdout=file,
            check=True,
            stderr=subprocess.DEVNULL,
        )
    assert command("verify", tmp_path / "s").code == 0


def test_terminal_gets_no_stream(snapshot: Path) -> None:
    ours, theirs = os.openpty()
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "pyqmigrate", "convert", str(snapshot), "-", "--to", "stream"],
            stdout=theirs,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert ran.returncode == 2
    assert b"terminal" in ran.stderr


@pytest.mark.parametrize(
    ("words", "algorithm"),
    [
        (["pack", "--seal", "SNAP", "MEM"], "xxh3-128"),
        (["pack", "SNAP", "--seal", "MEM"], "xxh3-128"),
        (["pack", "SNAP", "MEM", "--seal"], "xxh3-128"),
        (["pack", "--seal", "sha256", "SNAP", "MEM"], "sha256"),
        (["pack", "SNAP", "--seal", "sha256", "MEM"], "sha256"),
        (["pack", "SNAP", "MEM", "--seal", "sha256"], "sha256"),
        (["pack", "--seal=sha256", "SNAP", "MEM"], "sha256"),
        (["pack", "--seal", "--channels", "1", "SNAP", "MEM"], "xxh3-128"),
        (["pack", "--seal", "--", "SNAP", "MEM"], "xxh3-128"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_seal_takes_its_algorithm_in_every_order(
    words: list[str], algorithm: str, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "memory").write_bytes(pages(3))
    places = {"SNAP": str(tmp_path / "s"), "MEM": f"ram={tmp_path}/memory"}
    ran = command("--json", *(places.get(word, word) for word in words))
    assert ran.code == 0, ran.err
    assert ran.json["seal"] == {"path": f"{tmp_path}/s.seal", "algorithm": algorithm}


def test_usage_shows_that_the_algorithm_can_be_left_out(command: Command) -> None:
    for verb in (["pack"], ["vm", "save"]):
        assert "[--seal [ALGORITHM]]" in command(*verb, "--help").out
