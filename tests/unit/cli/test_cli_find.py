"""The verbs find, strings and read: what they print."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyqmigrate import RamBlock, save
from tests.harness.command import COMMAND, Command
from tests.harness.json_page import assert_as_documented

PAGE = 4096


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """Two blocks, with a text across two pages, and one in UTF-16."""
    first, second = np.zeros(16 * PAGE, np.uint8), np.zeros(4 * PAGE, np.uint8)
    text = b"the secret word\n"
    first[3 * PAGE - 4 : 3 * PAGE + 12] = np.frombuffer(text, np.uint8)
    wide = "Passwort".encode("utf-16-le")
    second[77 : 77 + len(wide)] = np.frombuffer(wide, np.uint8)
    save(tmp_path / "guest", [RamBlock("one", first), RamBlock("two", second)])
    return tmp_path / "guest"


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("pattern", "options", "block", "offset"),
    [
        ("secret", (), "one", 3 * PAGE),
        ("73 65 63 72 65 74", ("--hex",), "one", 3 * PAGE),
        ("s[ec]+ret", ("--regex",), "one", 3 * PAGE),
        ("Passwort", ("--utf-16",), "two", 77),
        ("the", ("--block", "one"), "one", 3 * PAGE - 4),
    ],
)
def test_find_prints_the_place(
    guest: Path, command: Command, pattern: str, options: tuple[str, ...], block: str, offset: int
) -> None:
    ran = command("find", guest, pattern, *options)
    assert ran.code == 0
    assert f"{block}:{offset:#x}  " in ran.out
    lines = objects(command("find", guest, pattern, *options, "--json").out)
    for line in lines:
        assert_as_documented("find", line)
    assert (lines[0]["match"]["block"], lines[0]["match"]["offset"]) == (block, offset)
    assert lines[-1]["matches"] == len(lines) - 1 == 1


def test_find_shows_the_bytes_around(guest: Path, command: Command) -> None:
    ran = command("find", guest, "secret", "--context", "4")
    assert "the secret wor" in ran.out


def test_count_is_all_that_is_printed(guest: Path, command: Command) -> None:
    assert command("find", guest, "secret", "--count").out == "1\n"
    assert command("find", guest, "nothing", "--count").out == "0\n"
    [line] = objects(command("find", guest, "secret", "--count", "--json").out)
    assert line["matches"] == 1


def test_nothing_found_is_done(guest: Path, command: Command) -> None:
    ran = command("find", guest, "nowhere")
    assert (ran.code, ran.err) == (0, "")
    assert "0 found" in ran.out


def test_strings_prints_each_with_its_place(guest: Path, command: Command) -> None:
    assert "  one:0x2ffc  the secret word\n" in command("strings", guest, "-n", "8").out
    lines = objects(command("strings", guest, "--utf-16", "--json").out)
    for line in lines:
        assert_as_documented("strings", line)
    assert lines[0]["string"]["text"] == "Passwort"
    assert lines[-1]["strings"] == 1


def test_read_shows_bytes_and_text(guest: Path, command: Command) -> None:
    shown = command("read", guest, "one:0x2ffc", "0x14").out.splitlines()
    assert shown[0].startswith("0x000000002ffc  74 68 65 20")
    assert shown[0].endswith(" the secret word.")
    assert shown[1].split() == ["0x00000000300c", "00", "00", "00", "00", "...."]
    assert command("read", guest, "one:0x2ffc", "3", "--hex").out == "746865\n"


def test_read_writes_the_bytes_as_they_are(guest: Path) -> None:
    words = [*COMMAND, "read", str(guest), "one:0x2ffc", "2M", "--raw"]
    done = subprocess.run(words, capture_output=True, check=False)
    assert done.returncode == 2
    words[-2] = "16"
    assert subprocess.check_output(words) == b"the secret word\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("find", "{guest}", ""), "1 to 4096 bytes"),
        (("find", "{guest}", "xy", "--hex"), "hex digits"),
        (("find", "{guest}", "(", "--regex"), "wrong"),
        (("find", "{guest}", "a", "--block", "three"), "three"),
        (("find", "{guest}", "a", "--address-range", "5-4"), "empty"),
        (("find", "{guest}", "a", "--context", "1G"), "context"),
        (("strings", "{guest}", "-n", "0"), "at least 1"),
        (("read", "{guest}", "one", "16"), "not a place"),
        (("read", "{guest}", "one:0xfff0", "17"), "not inside"),
        (("read", "{guest}", "three:0", "1"), "three"),
        (("read", "{guest}", "one:0", "1", "--raw", "--json"), "--raw"),
    ],
)
def test_wrong_use_is_refused(
    guest: Path, command: Command, words: tuple[str, ...], said: str
) -> None:
    ran = command(*(word.format(guest=guest) for word in words))
    assert ran.code == 2
    assert said in ran.err


def test_address_is_refused_where_none_is_known(guest: Path, command: Command) -> None:
    for words in (("read", guest, "@0", "1"), ("find", guest, "a", "--address-range", "0-1G")):
        assert command(*words).code == 5


def test_compressed_stream_and_pipe_are_searched(
    guest: Path, command: Command, tmp_path: Path
) -> None:
    stream = tmp_path / "stream"
    assert command("convert", guest, stream, "--to", "stream").code == 0
    (tmp_path / "gz").write_bytes(gzip.compress(stream.read_bytes()))
    place = "one:0x3000  secret\n"
    assert place in command("find", tmp_path / "gz", "secret").out
    done = subprocess.run(
        [*COMMAND, "find", "-", "secret"],
        input=stream.read_bytes(),
        capture_output=True,
        check=True,
    )
    assert place in done.stdout.decode()
    assert "746865\n" in command("read", tmp_path / "gz", "one:0x2ffc", "3", "--hex").out
    assert "the secret word" in command("strings", tmp_path / "gz", "-n", "9").out


def test_reader_that_goes_away_ends_the_search(guest: Path) -> None:
    words = " ".join([*COMMAND, "find", str(guest), "00", "--hex", "--json"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} | head -n 1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["match"]["offset"] == 0
