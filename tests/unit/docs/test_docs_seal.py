"""The examples of the page on seals run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import pyqmigrate

PAGE = Path(__file__).parents[3] / "docs" / "seal.md"
[USE, CHECK] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run(program: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(program, str(PAGE), "exec"), names)


def test_the_example_seals_and_finds_the_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(USE)
    assert capsys.readouterr().out.splitlines() == ["True", "1 pc.ram 0"]
    check = pyqmigrate.verify_seal("guest.mapped")
    assert check is not None
    assert (check.intact, check.algorithm) == (True, "blake3")


def test_another_program_can_check_a_seal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    memory = bytearray(b"guest" * 4096 * 1000)
    pyqmigrate.save("guest.mapped", [pyqmigrate.RamBlock("pc.ram", memory)], seal="xxh3-128")
    run(CHECK)
    with Path("guest.mapped").open("r+b") as file:
        file.seek(9_000_000)
        file.write(b"X")
    with pytest.raises(AssertionError):
        run(CHECK)
