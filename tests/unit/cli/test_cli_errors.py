"""A path that leads nowhere is named as it was given, with the part of it that is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.command import Command, pages

NO_FILE = "no file 'missing'"
NO_DIRECTORY = "no directory '/nonexist'"
NOT_A_DIRECTORY = "memory' is not a directory"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("info missing", NO_FILE),
        ("verify missing", NO_FILE),
        ("info none#monday", "no file 'none#monday', and 'none' is not a store"),
        ("devices missing", NO_FILE),
        ("seal missing", NO_FILE),
        ("unpack missing out", NO_FILE),
        ("convert missing out --to stream", NO_FILE),
        ("pack out ram=missing", NO_FILE),
        ("convert snap out --to stream --memory ram=missing", NO_FILE),
        ("convert snap out --to libvirt --like missing", NO_FILE),
        ("serve --qmp unix:q --ram ram=missing", NO_FILE),
        ("info /nonexist/x", NO_DIRECTORY),
        ("pack /nonexist/x ram=memory", NO_DIRECTORY),
        ("pack /nonexist/x ram=memory --seal", NO_DIRECTORY),
        ("pack /nonexist/x ram=memory --offset 4096", NO_DIRECTORY),
        ("convert snap /nonexist/x --to stream", NO_DIRECTORY),
        ("convert snap /nonexist/x --to mapped-ram", NO_DIRECTORY),
        ("convert snap /nonexist/x --to lime --map pc.ram@0", NO_DIRECTORY),
        ("convert snap /nonexist/x --to raw", NO_DIRECTORY),
        ("unpack snap /nonexist/x", NO_DIRECTORY),
        ("demo --dir /nonexist --size 8MiB", NO_DIRECTORY),
        ("bench --dir /nonexist --size 8MiB", NO_DIRECTORY),
        ("serve --qmp unix:/nonexist/q --ram ram=memory", NO_DIRECTORY),
        ("serve --qmp unix:q --ram ram=/nonexist/x,size=1M", NO_DIRECTORY),
        ("info memory/x", NOT_A_DIRECTORY),
        ("pack memory/x ram=memory", NOT_A_DIRECTORY),
        ("unpack snap memory", "memory' is not a directory"),
        ("info dangling", "'dangling' is a link to a file that is missing"),
    ],
)
def test_missing_part_of_a_path_is_named(
    words: str,
    said: str,
    tmp_path: Path,
    snapshot: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    snapshot.rename("snap")
    Path("memory").write_bytes(pages(3))
    Path("dangling").symlink_to("nowhere")
    before = {path.name for path in tmp_path.iterdir()}
    ran = command(*words.split(), "--json")
    assert ran.code == 3
    assert said in ran.err
    assert said in ran.json["error"]["message"]
    if words.startswith(("pack", "convert snap", "unpack snap")):
        assert "open the snapshot" not in ran.err
    after = {path.name for path in tmp_path.iterdir()}
    assert after - before <= {"q"}
