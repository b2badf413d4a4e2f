"""The verbs that read, on a snapshot of a store: what they print is what they print of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness.command import Command
from tests.harness.sealed import Sealed
from tests.harness.views import Views, make_store


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def sealed(tmp_path: Path) -> Sealed:
    (tmp_path / "shown").mkdir()
    return Sealed.make(tmp_path / "shown" / "monday")


@pytest.fixture
def views(sealed: Sealed, monkeypatch: pytest.MonkeyPatch) -> Views:
    return Views(sealed.path.parent).install(monkeypatch)


@pytest.fixture
def stored(tmp_path: Path, views: Views) -> str:
    return f"{make_store(tmp_path / 'store')}#monday"


def same(one: dict[str, Any], other: dict[str, Any], *but: str) -> bool:
    return all(one[key] == other[key] for key in one.keys() | other.keys() if key not in but)


@pytest.mark.parametrize("verb", ["info", "devices"])
def test_verb_prints_of_it_what_it_prints_of_the_file(
    command: Command, sealed: Sealed, stored: str, verb: str, views: Views
) -> None:
    of_store, of_file = command(verb, "--json", stored), command(verb, "--json", sealed.path)
    assert of_store.code == of_file.code == 0
    assert same(of_store.json, of_file.json, "snapshot")
    assert views.made
    assert all(view.closed for view in views.made)


def test_verify_compares_it_with_its_seal_through_one_view(
    command: Command, stored: str, views: Views
) -> None:
    ran = command("verify", "--json", stored)
    assert ran.code == 0
    assert ran.json["seal"]["path"] == f"{stored}.seal"
    assert len(views.made) == 1
    assert "shown" not in command("verify", stored).out


def test_verify_names_what_is_damaged(command: Command, sealed: Sealed, stored: str) -> None:
    sealed.write(sealed.block("big")[1] + 5, b"other")
    ran = command("verify", stored)
    assert ran.code == 1
    assert f"{stored}.seal" in ran.out
    assert "big" in ran.out


def test_convert_reads_it(command: Command, sealed: Sealed, stored: str, tmp_path: Path) -> None:
    of_store, of_file = tmp_path / "one", tmp_path / "other"
    assert command("convert", stored, of_store, "--to", "stream").code == 0
    assert command("convert", sealed.path, of_file, "--to", "stream").code == 0
    assert of_store.read_bytes() == of_file.read_bytes()


def test_unpack_reads_it(command: Command, sealed: Sealed, stored: str, tmp_path: Path) -> None:
    assert command("unpack", stored, tmp_path / "raw").code == 0
    assert (tmp_path / "raw" / "small.raw").read_bytes() == sealed.small.tobytes()


def test_seal_refuses_it_and_says_why(command: Command, stored: str) -> None:
    ran = command("seal", stored)
    assert ran.code == 2
    assert "cannot be sealed here" in ran.err


def test_convert_refuses_to_write_it(
    command: Command, sealed: Sealed, stored: str, tmp_path: Path
) -> None:
    ran = command("convert", sealed.path, stored, "--to", "stream")
    assert ran.code == 2
    assert "store add" in ran.err
