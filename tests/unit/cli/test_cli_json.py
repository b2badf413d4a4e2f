"""One JSON vocabulary over the verbs: what each prints is what docs/json.md says."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from tests.harness.command import COMMAND, Command, pages
from tests.harness.json_page import assert_as_documented, documented

VERBS = (
    "pack",
    "unpack",
    "info",
    "devices",
    "seal",
    "verify",
    "diff",
    "find",
    "strings",
    "read",
    "map",
    "convert",
    "store create",
    "store add",
    "store list",
    "store show",
    "store get",
    "store rm",
    "store gc",
    "store verify",
    "store copy",
    "compact",
    "demo",
    "bench",
    "mount",
    "umount",
    "page-server",
    "serve",
    "vm save",
    "vm check",
    "vm restore",
    "vm clone",
    "vm wait",
    "vm pool",
    "fleet verify",
    "fleet info",
    "fleet add",
    "fleet seal",
    "fleet table",
)


def test_every_verb_has_its_table() -> None:
    assert set(documented()) == {"Every verb", *VERBS}


def test_a_key_has_the_same_type_in_every_verb() -> None:
    kinds = defaultdict(set)
    for keys in documented().values():
        for path, key in keys.items():
            kinds[re.split(r"[.*]+", path)[-1]].add(key.kind)
    assert not {name: found for name, found in kinds.items() if len(found) > 1}


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("info", ("{snapshot}",)),
        ("info", ("{stream}",)),
        ("devices", ("{snapshot}",)),
        ("unpack", ("{snapshot}", "{new}")),
        ("verify", ("{snapshot}", "--deep")),
        ("verify", ("{sealed}",)),
        ("seal", ("{snapshot}",)),
        ("seal", ("{stream}",)),
        ("pack", ("{new}", "ram={memory}")),
        ("pack", ("{new}", "ram={memory}", "--seal")),
        ("convert", ("{snapshot}", "{new}", "--to", "stream")),
        ("convert", ("{stream}", "{new}", "--to", "mapped-ram")),
        ("convert", ("{snapshot}", "{new}", "--to", "raw")),
        ("convert", ("{snapshot}", "{new}", "--to", "lime", "--map", "pc.ram@0")),
        ("store create", ("{new}",)),
        ("store add", ("{store}", "{snapshot}", "--name", "b", "--label", "a=b")),
        ("store list", ("{store}",)),
        ("store show", ("{store}", "a")),
        ("store get", ("{store}", "a", "{new}")),
        ("store rm", ("{store}", "a")),
        ("store rm", ("{store}", "--keep", "7d/4w", "-n")),
        ("store gc", ("{store}",)),
        ("store verify", ("{store}",)),
        ("store copy", ("{store}", "{new}")),
        ("diff", ("{snapshot}", "{snapshot}", "--pages", "--fields")),
        ("find", ("{snapshot}", "no such text")),
        ("find", ("{snapshot}", "00", "--hex", "--count")),
        ("read", ("{snapshot}", "pc.ram:0x1000", "16")),
        ("map", ("{snapshot}",)),
        ("map", ("{snapshot}", "{snapshot}", "--html", "{new}")),
        ("compact", ("{stream}", "{new}")),
        ("bench", ("--dir", "{directory}", "--size", "8MiB", "--channels", "1")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_json_has_the_documented_keys(
    verb: str, arguments: tuple[str, ...], tmp_path: Path, snapshot: Path, command: Command
) -> None:
    places = {
        "snapshot": snapshot,
        "stream": tmp_path / "stream",
        "sealed": tmp_path / "sealed",
        "new": tmp_path / "new",
        "memory": tmp_path / "memory",
        "directory": tmp_path,
        "store": tmp_path / "store",
    }
    places["memory"].write_bytes(pages(5, 3))
    if "{stream}" in arguments:
        command("convert", snapshot, places["stream"], "--to", "stream")
    if "{sealed}" in arguments:
        command("pack", places["sealed"], f"ram={places['memory']}", "--seal")
    if "{store}" in arguments:
        command("store", "create", places["store"])
        assert command("store", "add", places["store"], snapshot, "--name", "a").code == 0
    ran = command(*verb.split(), *(text.format(**places) for text in arguments), "--json")
    assert ran.code == 0, ran.err
    assert ran.json["schema"] == 1
    assert_as_documented(verb, ran.json)


def test_failure_has_the_documented_keys(tmp_path: Path, command: Command) -> None:
    for arguments in (("info", str(tmp_path / "nowhere")), ("info",), ("info", __file__)):
        ran = command(*arguments, "--json")
        assert ran.code in (1, 2, 3)
        assert set(ran.json) == {"schema", "error"}
        known = {path for path in documented()["Every verb"] if path.startswith("error.")}
        assert {f"error.{key}" for key in ran.json["error"]} <= known


@pytest.mark.parametrize("place", ["before", "after"])
def test_general_options_are_before_or_after_the_verb(
    snapshot: Path, command: Command, place: str
) -> None:
    for option in ("--json", "-v", "-q", "--no-progress", "--verbose", "--quiet"):
        words = [option, "info"] if place == "before" else ["info", option]
        assert command(*words, snapshot).code == 0
    words = ["--json", "info"] if place == "before" else ["info", "--json"]
    assert command(*words, snapshot).json["kind"] == "mapped-ram"
    words = ["-q", "info"] if place == "before" else ["info", "-q"]
    quiet = command(*words, snapshot)
    assert (quiet.out, quiet.err) == ("", "")
    words = ["-v", "pack"] if place == "before" else ["pack", "-v"]
    memory = snapshot.with_name("memory")
    memory.write_bytes(bytes(8192))
    verbose = command(*words, snapshot.with_name("new"), f"a={memory}")
    assert "pyqmigrate: saved " in verbose.err


def test_every_verb_lists_the_general_options(command: Command) -> None:
    for verb in VERBS:
        text = command(*verb.split(), "--help").out
        assert all(f" {option}" in text for option in ("--json", "-v", "-q", "--no-progress")), verb


def test_quiet_verb_still_prints_its_error(tmp_path: Path, command: Command) -> None:
    ran = command("-q", "info", tmp_path / "nowhere")
    assert (ran.code, ran.out) == (3, "")
    assert "nowhere" in ran.err


def test_serve_says_when_it_listens_and_its_json_has_the_documented_keys(tmp_path: Path) -> None:
    socket = tmp_path / "vm.qmp"
    process = subprocess.Popen(
        [
            *COMMAND,
            "serve",
            "--json",
            "--qmp",
            f"unix:{socket}",
            "--ram",
            f"pc.ram={tmp_path}/guest-ram,size=1G",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == f"pyqmigrate: listening on unix:{socket}\n"
    assert socket.exists()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    data = json.loads(out)
    assert data["total_ram"] == 1 << 30
    assert_as_documented("serve", data)
