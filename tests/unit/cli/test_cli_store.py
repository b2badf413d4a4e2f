"""The verbs of ``store``, as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.cli import main
from pyqmigrate.store import Store
from tests.harness.snapshots import known_memory, save_known


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """Run a verb with --json; returns its exit code and the object."""

    def do(*words: object) -> tuple[int, Any]:
        code = main(["store", *map(str, words), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return do


@pytest.fixture
def store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A store with the snapshots one and two."""
    path = tmp_path / "store"
    assert main(["store", "create", str(path)]) == 0
    for seed, name in enumerate(("one", "two")):
        save_known(tmp_path / f"{name}.mapped", seed=seed)
        words = ["store", "add", str(path), str(tmp_path / f"{name}.mapped"), "--name", name]
        assert main([*words, "--label", f"n={seed}"]) == 0
    capsys.readouterr()
    return path


def test_a_snapshot_is_added_listed_shown_and_got(
    store: Path, tmp_path: Path, run: Callable[..., tuple[int, Any]]
) -> None:
    code, listed = run("list", store)
    assert code == 0
    assert [entry["name"] for entry in listed["snapshots"]] == ["one", "two"]
    assert listed["snapshots"][1]["labels"] == {"n": "1"}
    code, shown = run("show", store, "one")
    assert code == 0
    assert shown["size"] == (tmp_path / "one.mapped").stat().st_size
    assert shown["companions"][".seal"] > 0
    assert [block["length"] for block in shown["blocks"]] == [len(known_memory())]
    code, got = run("get", store, "one", tmp_path / "back")
    assert code == 0
    assert (tmp_path / "back").read_bytes() == (tmp_path / "one.mapped").read_bytes()
    assert got["path"] == str(tmp_path / "back")
    assert got["beside"] == [str(tmp_path / "back.seal")]
    assert main(["verify", str(tmp_path / "back")]) == 0


def test_without_a_path_the_file_has_the_name_of_the_snapshot(
    store: Path,
    tmp_path: Path,
    run: Callable[..., tuple[int, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("get", store, "two")[1]["path"] == str(tmp_path / "two")


def test_a_name_is_taken_from_the_file(
    store: Path, tmp_path: Path, run: Callable[..., tuple[int, Any]]
) -> None:
    code, added = run("add", store, tmp_path / "one.mapped")
    assert (code, added["name"], added["new_pages"]) == (0, "one.mapped", 0)
    code, refused = run("add", store, tmp_path / "one.mapped")
    assert code == 2
    assert refused["error"]["type"] == "UsageError"


def test_removing_and_collecting(store: Path, run: Callable[..., tuple[int, Any]]) -> None:
    assert run("rm", store, "--keep", "1d", "--match", "t*")[1]["kept"] == ["two"]
    code, dry = run("rm", store, "two", "--dry-run")
    assert (code, dry["removed"], dry["dry_run"]) == (0, ["two"], True)
    code, removed = run("rm", store, "two")
    assert (code, removed["removed"]) == (0, ["two"])
    code, collected = run("gc", store)
    assert (code, collected["removed_packs"], collected["snapshot_count"]) == (0, 0, 1)
    assert collected["young_packs"] > 0
    assert run("rm", store, "two")[0] == 2
    assert run("rm", store)[0] == 2
    assert run("rm", store, "--keep", "7x")[0] == 2


def test_a_snapshot_in_use_is_not_removed(store: Path, run: Callable[..., tuple[int, Any]]) -> None:
    with Store.open(store) as opened, opened.open_file("one"):
        code, removed = run("rm", store, "one")
    assert (code, removed["in_use"], removed["removed"]) == (3, ["one"], [])


def test_verifying_finds_damage(
    store: Path, tmp_path: Path, run: Callable[..., tuple[int, Any]]
) -> None:
    code, verified = run("verify", store)
    assert (code, verified["intact"], verified["snapshot_count"]) == (0, True, 2)
    pack = max((store / "packs").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[20] ^= 1  # in its first frame
    pack.write_bytes(data)
    code, verified = run("verify", store)
    assert (code, verified["intact"]) == (1, False)
    (damage,) = verified["damages"]
    assert damage["pack"] == pack.stem
    assert damage["frame"] is not None
    assert damage["names"]
    assert run("get", store, damage["names"][0], tmp_path / "x")[0] == 1


def test_copying(store: Path, tmp_path: Path, run: Callable[..., tuple[int, Any]]) -> None:
    code, copied = run("copy", store, tmp_path / "other", "two")
    assert (code, copied["copied"]) == (0, ["two"])
    code, copied = run("copy", store, tmp_path / "other")
    assert (code, copied["copied"], copied["present"]) == (0, ["one"], ["two"])
    assert run("verify", tmp_path / "other")[1]["intact"]


def test_a_directory_that_is_not_a_store_is_wrong_usage(
    tmp_path: Path, run: Callable[..., tuple[int, Any]]
) -> None:
    for words in (["list"], ["verify"], ["gc"], ["get", "x"], ["rm", "x"], ["show", "x"]):
        code, failed = run(words[0], tmp_path, *words[1:])
        assert code == 2
        assert "is not a store" in failed["error"]["message"]


@pytest.mark.parametrize(
    "words",
    [
        ("list",),
        ("show", "one"),
        ("get", "one", "PATH"),
        ("rm", "one", "-n"),
        ("gc",),
        ("verify",),
        ("copy", "PATH"),
        ("add", "SNAPSHOT"),
    ],
)
def test_people_get_lines_and_no_json(
    store: Path, tmp_path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"PATH": str(tmp_path / "out"), "SNAPSHOT": str(tmp_path / "one.mapped")}
    verb, *rest = words
    assert main(["store", verb, str(store), *(paths.get(word, word) for word in rest)]) == 0
    out = capsys.readouterr().out
    assert out
    assert not out.startswith("{")


def test_a_damaged_snapshot_is_listed_with_its_error(
    store: Path, run: Callable[..., tuple[int, Any]]
) -> None:
    (store / "snapshots" / "one.snap").write_bytes(b"{}\n")
    code, listed = run("list", store)
    assert code == 1
    assert [entry["damage"] is None for entry in listed["snapshots"]] == [False, True]


@pytest.mark.parametrize(
    "words", [("gc", "--wait", "x"), ("gc", "--wait", "-1"), ("add", "f", "--label", "x")]
)
def test_bad_options_are_wrong_usage(store: Path, words: tuple[str, ...]) -> None:
    assert main(["store", words[0], str(store), *words[1:]]) == 2
