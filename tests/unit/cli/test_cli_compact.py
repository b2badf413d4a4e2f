"""The verbs that read, on a compact file: what they print is what they print of the plain file.

They read it through a private mount, and through a copy where nothing can be mounted.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

import pyqmigrate
from pyqmigrate.errors import NotSupported
from pyqmigrate.io.seekable_file import SeekableFile
from tests.harness.command import Command
from tests.harness.sealed import Sealed
from tests.harness.snapshots import load


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def sealed(tmp_path: Path) -> Sealed:
    return Sealed.make(tmp_path / "guest")


@pytest.fixture(params=["mounted", "copied"])
def compacted(
    request: pytest.FixtureRequest, sealed: Sealed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    if request.param == "copied":

        def refuse(*_: object) -> None:
            raise NotSupported("nothing can be mounted")

        monkeypatch.setattr("pyqmigrate.mount.view.MountedView", refuse)
    pyqmigrate.compact(sealed.path, tmp_path / "compact")
    return tmp_path / "compact"


def same(one: dict[str, Any], other: dict[str, Any], *but: str) -> bool:
    return all(one[key] == other[key] for key in one.keys() | other.keys() if key not in but)


@pytest.mark.parametrize("verb", ["info", "devices"])
def test_verb_prints_of_it_what_it_prints_of_the_file(
    command: Command, sealed: Sealed, compacted: Path, verb: str
) -> None:
    of_compact, of_file = command(verb, "--json", compacted), command(verb, "--json", sealed.path)
    assert of_compact.code == of_file.code == 0
    assert same(of_compact.json, of_file.json, "snapshot", "bytes_allocated")


def test_verify_compares_it_with_its_seal(command: Command, compacted: Path) -> None:
    ran = command("verify", "--json", compacted)
    assert ran.code == 0
    assert ran.json["seal"]["path"] == f"{compacted}.seal"
    assert ran.json["seal"]["intact"]
    assert ran.json["seal"]["notes"] == []


def test_verify_finds_that_the_plain_file_was_damaged(
    command: Command, sealed: Sealed, compacted: Path, tmp_path: Path
) -> None:
    info = sealed.path.stat()
    sealed.write(sealed.block("big")[1] + 5, b"other")
    os.utime(sealed.path, ns=(info.st_mtime_ns, info.st_mtime_ns))
    pyqmigrate.compact(sealed.path, compacted)
    ran = command("verify", compacted)
    assert ran.code == 1
    assert "big" in ran.out


def test_convert_makes_the_plain_file_of_it(
    command: Command, sealed: Sealed, compacted: Path, tmp_path: Path
) -> None:
    assert command("convert", compacted, tmp_path / "plain", "--to", "mapped-ram").code == 0
    assert load(tmp_path / "plain")["big"].tobytes() == sealed.big.tobytes()


def test_diff_reads_nothing_of_it_and_its_plain_file(
    command: Command, sealed: Sealed, compacted: Path
) -> None:
    ran = command("diff", "--json", sealed.path, compacted)
    assert ran.code == 0
    assert (ran.json["equal"], ran.json["seals"], ran.json["bytes_read"]) == (True, True, 0)
    assert command("diff", "--no-seals", sealed.path, compacted).code == 0


def test_an_open_compact_file_is_read_at_random(sealed: Sealed, compacted: Path) -> None:
    with pyqmigrate.open_snapshot(compacted) as snapshot:
        block = snapshot.blocks["big"]
        for offset in np.random.default_rng(1).integers(0, len(sealed.big) - 9000, 50):
            expected = sealed.big[offset : offset + 9000].tobytes()
            assert block.read(int(offset), 9000) == expected


def test_it_is_compacted_again_as_it_was(sealed: Sealed, compacted: Path, tmp_path: Path) -> None:
    report = pyqmigrate.compact(compacted, tmp_path / "again", level=5)
    assert report.sealed
    once, twice = SeekableFile(compacted), SeekableFile(tmp_path / "again")
    assert once.read(0, once.size) == twice.read(0, twice.size) == sealed.path.read_bytes()
    assert once.mtime_ns == twice.mtime_ns
    assert once.companions == twice.companions
    once.close()
    twice.close()


@pytest.mark.parametrize("verb", ["compact", "convert"])
def test_it_is_not_overwritten_by_what_reads_it(
    command: Command, compacted: Path, verb: str
) -> None:
    before = compacted.read_bytes()
    form = ["--to", "mapped-ram"] if verb == "convert" else []
    ran = command(verb, compacted, compacted, *form)
    assert ran.code == 2
    assert "the compact file that is read" in ran.err
    assert compacted.read_bytes() == before


def test_damage_of_it_is_an_error_and_never_a_wrong_page(
    command: Command, sealed: Sealed, compacted: Path, tmp_path: Path
) -> None:
    data = bytearray(compacted.read_bytes())
    data[len(data) // 2] ^= 1
    compacted.write_bytes(data)
    ran = command("convert", compacted, tmp_path / "plain", "--to", "mapped-ram")
    assert ran.code == 1
    assert not (tmp_path / "plain").exists()


def test_a_compressed_sequential_stream_is_read_front_to_back_as_ever(
    command: Command, sealed: Sealed, tmp_path: Path
) -> None:
    pyqmigrate.convert(sealed.path, tmp_path / "stream", to="stream")
    (tmp_path / "stream.zst").write_bytes(zstandard.compress((tmp_path / "stream").read_bytes()))
    ran = command("info", "--json", tmp_path / "stream.zst")
    assert (ran.code, ran.json["kind"]) == (0, "stream")


def test_no_mount_is_left(compacted: Path) -> None:
    with pyqmigrate.open_snapshot(compacted) as snapshot:
        assert snapshot.machine == "pc-q35-10.0"
    deadline = time.monotonic() + 20
    while any(str(compacted) in text for text in commands()):
        assert time.monotonic() < deadline, "a keeper is left"
        time.sleep(0.05)
    assert str(compacted) not in Path("/proc/mounts").read_text()


def commands() -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.append((process / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return found
