"""The demo: equal memories, honest numbers, and nothing left behind."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.cli import demo, demo_qemu
from pyqmigrate.cli.contents import PAGE, SMALLEST, fill, first_difference, guest_memory
from pyqmigrate.cli.scratch import fitting_size
from pyqmigrate.cli.sizes import MIB
from pyqmigrate.errors import NoSpace, TargetError
from tests.harness.command import Command
from tests.harness.json_page import assert_as_documented

qemu = demo_qemu.find_qemu()
needs_qemu = [pytest.mark.qemu, pytest.mark.skipif(isinstance(qemu, str), reason=str(qemu))]


@pytest.fixture
def no_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty directory as the PATH."""
    path = tmp_path / "bin"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    return path


def fake_qemu(path: Path, script: str) -> None:
    file = path / "qemu-system-x86_64"
    file.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo "QEMU emulator version 10.0.2"; exit; }\n'
        + script
    )
    file.chmod(0o755)


def test_demo_without_qemu_says_so_and_is_done(no_qemu: Path, disk: Path, command: Command) -> None:
    ran = command("demo", "--size", "8MiB", "--dir", disk)
    assert ran.code == 0
    assert ran.out.count("memory is equal") == 2
    assert "not loaded by QEMU: there is no qemu-system-x86_64 >= 9.0 on the PATH" in ran.out
    assert list(disk.iterdir()) == []


def test_demo_json_reports_every_step(no_qemu: Path, disk: Path, command: Command) -> None:
    ran = command("demo", "--size", "16MiB", "--dir", disk, "--channels", "1", "--json").json
    assert ran["total_ram"] == (ran["data_pages"] + ran["zero_pages"]) * PAGE == 16 * MIB
    assert_as_documented("demo", ran)
    assert ran["equal"] is True
    assert ran["qemu"] is None
    steps = [(step["step"], step["direct_io"]) for step in ran["steps"]]
    assert steps == [("save", True), ("load", True), ("save", False), ("load", False)]
    data = ran["data_pages"] * PAGE
    direct, _, buffered, _ = ran["steps"]
    assert direct["bytes_cached"] < data // 10 < data <= buffered["bytes_cached"]
    assert all(data <= step["bytes_allocated"] <= step["file_size"] for step in ran["steps"])


def test_demo_in_memory_has_no_direct_io(no_qemu: Path, shm: Path, command: Command) -> None:
    ran = command("demo", "--size", "8MiB", "--dir", shm, "--json").json
    assert [step["direct_io"] for step in ran["steps"]] == [False, False]
    assert "alignment" in ran["direct_io_reason"]


@pytest.mark.parametrize("where", ["disk", "shm"])
@pytest.mark.parametrize("marks", [pytest.param(None, marks=needs_qemu)], ids=["qemu"])
def test_qemu_loads_the_demo_and_its_memory_is_equal(
    where: str, marks: None, request: pytest.FixtureRequest, command: Command
) -> None:
    directory: Path = request.getfixturevalue(where)
    ran = command("demo", "--size", "16MiB", "--dir", directory, "--json")
    assert ran.code == 0
    [step] = [step for step in ran.json["steps"] if step["step"] == "qemu-load"]
    assert step["difference"] is None
    assert ran.json["qemu"] in str(qemu)


def test_difference_is_found_and_exits_1(
    no_qemu: Path, disk: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(one: mmap.mmap, other: mmap.mmap) -> int | None:
        other[5 * PAGE + 7] ^= 1
        return first_difference(one, other)

    monkeypatch.setattr(demo, "first_difference", damaged)
    ran = command("demo", "--size", "8MiB", "--dir", disk)
    assert ran.code == 1
    assert "MEMORY DIFFERS from byte 0x5000 on (direct)" in ran.out


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo no machine for you >&2; exit 1", "ended with 1; it said: no machine for you"),
        ("exec sh -c 'kill -SEGV $$'", "ended with -11; it said nothing"),
    ],
)
def test_qemu_that_dies_exits_4_with_its_last_words(
    script: str,
    words: str,
    no_qemu: Path,
    disk: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", f"{no_qemu}:/usr/bin:/bin")
    fake_qemu(no_qemu, script)
    ran = command("demo", "--size", "8MiB", "--dir", disk)
    assert (ran.code, ran.out) == (4, "")
    assert words in ran.err
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("QEMU emulator version 7.2.4", "is QEMU 7.2.4"), ("hello", "does not show its version")],
)
def test_qemu_that_is_too_old_is_not_asked(answer: str, reason: str, no_qemu: Path) -> None:
    file = no_qemu / "qemu-system-x86_64"
    file.write_text(f"#!/bin/sh\necho '{answer}'\n")
    file.chmod(0o755)
    found = demo_qemu.find_qemu()
    assert isinstance(found, str)
    assert reason in found


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    with guest_memory(SMALLEST) as memory:
        yield memory


def test_guest_memory_has_its_three_parts(memory: mmap.mmap) -> None:
    fill(memory)
    data = [any(memory[at : at + PAGE]) for at in range(0, SMALLEST, PAGE)]
    assert all(data[:512])
    runs = data[512:1024]
    assert all(len(set(runs[at : at + 16])) == 1 for at in range(0, 512, 16))
    assert 0.2 < sum(runs) / 512 < 0.8
    assert 0.6 < sum(data[1024:]) / 1024 < 0.8


def test_first_difference_is_the_page_of_the_changed_byte(memory: mmap.mmap) -> None:
    fill(memory)
    with guest_memory(SMALLEST) as copy:
        copy[:] = memory[:]
        assert first_difference(memory, copy) is None
        copy[3 * MIB + PAGE + 1] ^= 1
        assert first_difference(memory, copy) == 3 * MIB + PAGE


def test_default_size_shrinks_to_the_room(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyqmigrate.cli.scratch.free_bytes", lambda directory: 200 * MIB)
    assert fitting_size(None, 1024 * MIB, disk, memories=2) == 128 * MIB


def test_size_that_was_asked_for_does_not_shrink(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyqmigrate.cli.scratch.free_bytes", lambda directory: 200 * MIB)
    with pytest.raises(NoSpace):
        fitting_size(1024 * MIB, 1024 * MIB, disk, memories=2)


def test_lack_of_memory_is_found_before_it_is_taken(disk: Path) -> None:
    with pytest.raises(TargetError, match="of memory"):
        fitting_size(SMALLEST, SMALLEST, disk, memories=os.sysconf("SC_PHYS_PAGES"))
