"""Sizes that no file has, in every option that takes one: wrong usage, and nothing is touched."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.cli import build_parser
from pyqmigrate.cli.arguments import BadArguments
from pyqmigrate.cli.sizes import read_size
from tests.harness.command import Command

IMPOSSIBLE = ["0xffffffffffffffff", "8E", "9223372036854775808", "16EiB", "-1", "1e3", "", "1.5"]


def parsers(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every verb with its parser."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from parsers(child, (*words, name))


def sized() -> list[tuple[tuple[str, ...], str]]:
    """Every verb and option that takes a size."""
    found = []
    for verb in (
        "demo",
        "pack",
        "unpack",
        "info",
        "devices",
        "seal",
        "verify",
        "convert",
        "bench",
        "serve",
    ):
        parser = build_parser()
        with contextlib.suppress(BadArguments):  # the verb has its parser now
            parser.parse_known_args([verb, "--no-such-option"])
        for words, child in parsers(parser):
            found += [
                (words, action.option_strings[0])
                for action in child._actions
                if action.type is read_size
            ]
    return found


@pytest.mark.parametrize(("words", "option"), sized(), ids=lambda value: "".join(value))
@pytest.mark.parametrize("size", IMPOSSIBLE)
def test_an_impossible_size_is_wrong_usage(
    words: tuple[str, ...], option: str, size: str, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "file").write_bytes(b"as it was")
    ran = command(*words, f"{option}={size}", tmp_path / "file", f"a={tmp_path}/file")
    assert ran.code == 2
    assert option in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"as it was"


@pytest.mark.parametrize("size", [*IMPOSSIBLE, "0", "4095", "1"])
def test_serve_with_an_impossible_size_touches_no_file(
    size: str, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "old").write_bytes(b"as it was")
    for name in ("old", "new"):
        ran = command(
            "serve",
            "--qmp",
            f"unix:{tmp_path}/qmp",
            "--ram",
            f"a={tmp_path}/first,size=4096",
            "--ram",
            f"b={tmp_path}/{name},size={size}",
        )
        assert ran.code == 2, ran
        assert "--ram" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"as it was"


def test_serve_with_a_size_that_the_file_system_refuses_leaves_no_file(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, length: int) -> None:
        raise OSError(27, "File too large")

    monkeypatch.setattr("pyqmigrate.cli.serve.os.ftruncate", refuse)
    (tmp_path / "old").write_bytes(b"as it was")
    for name in ("old", "new"):
        ran = command(
            "serve", "--qmp", f"unix:{tmp_path}/qmp", "--ram", f"a={tmp_path}/{name},size=4E"
        )
        assert ran.code == 3
        assert "File too large" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"as it was"
