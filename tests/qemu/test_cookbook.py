"""The recipes of docs/cookbook.md, run as they stand."""

from __future__ import annotations

import contextlib
import doctest
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pyqmigrate import convert, cpu_registers, devices, open_snapshot
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from tests.harness.saved import RAM, Saved, save_guest, serial_says

pytestmark = pytest.mark.qemu

PAGE = Path(__file__).parents[2] / "docs" / "cookbook.md"
PATIENCE = 60  # seconds


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    """A guest that QEMU saved while it ran."""
    return save_guest(module_disk, ["-M", "pc", "-m", str(RAM >> 20)])


@dataclass
class Kitchen:
    """A directory with the files that recipes begin with, and a shell in it."""

    directory: Path
    environment: dict[str, str]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def cook(self, title: str) -> list[str]:
        """Do what stands under the title, in its order; what each block printed."""
        text = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
        blocks = re.findall(r"^```(console|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        assert blocks
        return [
            self.console(body) if kind == "console" else self.python(body) for kind, body in blocks
        ]

    def console(self, body: str) -> str:
        printed = ""
        for step in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            command, _, shown = step.partition("\n")
            said = self.leave(command) if command.endswith("&") else self.run(command)
            assert matches(shown, said), f"{command}\n{said}"
            printed += said
        return printed

    def run(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.directory,
            env=self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def leave(self, command: str) -> str:
        """Start it, and go on as soon as it has said its first line."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command.removesuffix('&')}"],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.running.append(process)
        assert process.stdout is not None
        return process.stdout.readline().decode()

    def python(self, body: str) -> str:
        return self.run(f"{sys.executable} - <<'END'\n{body}END")

    def close(self) -> None:
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def matches(shown: str, said: str) -> bool:
    """As doctest's ELLIPSIS: what the page leaves out may be anything."""
    return not shown or doctest.OutputChecker().check_output(shown, said, doctest.ELLIPSIS)


@pytest.fixture
def kitchen(saved: Saved, disk: Path, child_environment: dict[str, str]) -> Iterator[Kitchen]:
    (disk / "bin").mkdir()
    command = disk / "bin" / "pyqmigrate"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pyqmigrate "$@"\n')
    command.chmod(0o700)
    (disk / "bin" / "python3").symlink_to(sys.executable)
    path = f"{disk}/bin:{child_environment['PATH']}"
    vm = " ".join(saved.command(serial=disk / "serial"))
    at_work = Kitchen(disk, {**child_environment, "PATH": path, "VM": vm})
    yield at_work
    at_work.close()


def test_every_recipe_is_cooked() -> None:
    titles = re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
    cooked = re.findall(r'^    .*cook\("(.*)"\)', Path(__file__).read_text(), re.MULTILINE)
    assert sorted(titles) == sorted(cooked)


def test_libvirt_save_is_opened_by_gdb(kitchen: Kitchen, saved: Saved) -> None:
    xml = "<domain type='qemu'>\n  <name>guest</name>\n</domain>\n"
    convert(saved.path, kitchen.directory / "guest.stream", to="stream")
    data = (kitchen.directory / "guest.stream").read_bytes()
    header = LibvirtHeader(True, 2, ImageFormat.RAW, True, xml, "", 5000, "little")
    (kitchen.directory / "guest.save").write_bytes(encode_header(header) + data)
    [printed] = kitchen.cook("Get the memory of a libvirt save into gdb")
    [cpu] = cpu_registers(devices(saved.path).devices)
    assert f"rip            {cpu.general['rip']:#x} " in printed
    there = " ".join(re.findall(r"\t0x(..)", printed.rpartition("0x7c00:")[2]))
    assert there == saved.memory["pc.ram"][0x7C00:0x7C04].hex(" ")


def test_old_save_restores_fast(kitchen: Kitchen, saved: Saved) -> None:
    convert(saved.path, kitchen.directory / "old.stream", to="stream")
    kitchen.cook("Make an old save restore fast")
    reports = len(saved.reports)
    # The guest goes on counting where it was saved.
    assert serial_says(kitchen.directory / "serial", 2)[:2] == bytes([reports + 1, reports + 2])


def test_damage_is_found(kitchen: Kitchen, saved: Saved) -> None:
    path = kitchen.directory / "guest.mapped"
    shutil.copy(saved.path, path)
    kitchen.cook("Know that a snapshot is whole before relying on it")
    with path.open("rb") as file:
        file.seek(10 << 20)
        assert file.read(1) != b"\xff", "the recipe changed nothing"


def test_cpus_are_seen(kitchen: Kitchen, saved: Saved) -> None:
    shutil.copy(saved.path, kitchen.directory / "guest.mapped")
    _, printed = kitchen.cook("See what the CPUs were doing")
    [cpu] = cpu_registers(devices(saved.path).devices)
    said = dict(re.findall(r"^(\w+) +(0x[0-9a-f]+)$", printed, re.MULTILINE))
    assert {name: int(value, 16) for name, value in said.items()} == cpu.general


def test_text_is_found(kitchen: Kitchen, saved: Saved) -> None:
    path = kitchen.directory / "guest.mapped"
    shutil.copy(saved.path, path)
    with open_snapshot(path) as snapshot:
        ram = snapshot.blocks["pc.ram"]
        held = [(a, b) for a, b, data in ram.runs() if data]
        at = held[-1][0] * ram.page_size + 77
        offset = ram.pages_offset  # type: ignore[union-attr]
    with path.open("r+b") as file:
        file.seek(offset + at)
        file.write(b"here it is")
    assert kitchen.cook("Find a text in guest memory") == [f"pc.ram {at:#x}\n"]


def put_text(path: Path, text: bytes) -> int:
    """Write a text into the last page of RAM with data; return where it is in the block."""
    with open_snapshot(path) as snapshot:
        ram = snapshot.blocks["pc.ram"]
        last = [first for first, _, data in ram.runs() if data][-1]
        at = last * ram.page_size + 77
        offset = ram.pages_offset  # type: ignore[union-attr]
    with path.open("r+b") as file:
        file.seek(offset + at)
        file.write(text)
    return at


def test_secret_is_found(kitchen: Kitchen, saved: Saved) -> None:
    path = kitchen.directory / "guest.mapped"
    shutil.copy(saved.path, path)
    at = put_text(path, b"here it is")
    _, printed = kitchen.cook("Find a secret in a guest that was saved, and where it is")
    before = saved.memory["pc.ram"][at - 8 : at].hex()
    assert printed == f"pc.ram {at:#x} {at:#x} {before}\n"


@pytest.mark.skipif(shutil.which("jq") is None, reason="there is no jq command")
def test_strings_are_compared(kitchen: Kitchen, saved: Saved) -> None:
    for name in ("guest.mapped", "later.mapped"):
        shutil.copy(saved.path, kitchen.directory / name)
    put_text(kitchen.directory / "later.mapped", b"\0here it is\0")
    kitchen.cook("Compare the strings of two snapshots")


def test_memory_is_read_by_address(kitchen: Kitchen, saved: Saved) -> None:
    shutil.copy(saved.path, kitchen.directory / "guest.mapped")
    console, _, printed = kitchen.cook("Read memory by its guest-physical address")
    firmware = saved.image.read_bytes()[-16:].hex(" ")
    assert firmware in console
    assert printed.endswith(f"{firmware}\n")
    assert "0x0 0xc0000 pc.ram\n" in printed


@pytest.mark.skipif(shutil.which("jq") is None, reason="there is no jq command")
def test_host_is_compared(kitchen: Kitchen, saved: Saved) -> None:
    shutil.copy(saved.path, kitchen.directory / "guest.mapped")
    kitchen.cook("Check whether a snapshot can be restored on this host")


def test_nights_are_kept(kitchen: Kitchen, saved: Saved) -> None:
    shutil.copy(saved.path, kitchen.directory / "guest.mapped")
    kitchen.cook("Keep a nightly series of increments")
    with open_snapshot(kitchen.directory / "kept.mapped") as snapshot:
        assert snapshot.format == "mapped-ram"
    # The guest went on counting, through both saves.
    counted = serial_says(kitchen.directory / "serial", 2)
    assert counted[0] == len(saved.reports) + 1


def test_an_agent_goes_back(kitchen: Kitchen, saved: Saved) -> None:
    shutil.copy(saved.path, kitchen.directory / "guest.mapped")
    kitchen.cook("Go back to an earlier step of an agent")
    for name in ("step1", "step2", "step2-again"):
        with open_snapshot(kitchen.directory / name) as snapshot:
            assert snapshot.format == "increment"
            snapshot.verify()


def test_what_changed_is_seen(kitchen: Kitchen, saved: Saved) -> None:
    shutil.copy(saved.path, kitchen.directory / "guest.mapped")
    _, printed = kitchen.cook("See what changed between two moments of a guest")
    ranges = [line.split() for line in printed.splitlines()]
    # The guest writes over all of its memory, which a PC has from address 0 on.
    found = [(int(first), int(address)) for block, first, _, address in ranges if block == "pc.ram"]
    assert found
    assert all(first * 4096 == address for first, address in found)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="there is no zstd command")
def test_a_snapshot_is_kept_compressed(kitchen: Kitchen, saved: Saved) -> None:
    shutil.copy(saved.path, kitchen.directory / "guest.mapped")
    kitchen.cook("Keep a snapshot in a fifth of the space")
    reports = len(saved.reports)
    assert serial_says(kitchen.directory / "serial", 2)[:2] == bytes([reports + 1, reports + 2])


def test_guest_that_must_not_stand_still_is_saved(kitchen: Kitchen, saved: Saved) -> None:
    shutil.copy(saved.path, kitchen.directory / "guest.mapped")
    kitchen.cook("Save a guest that must not stand still")
    with open_snapshot(kitchen.directory / "later") as snapshot:
        assert snapshot.format == "increment"
    # The guest went on counting, through both saves.
    assert serial_says(kitchen.directory / "serial", 2)[0] == len(saved.reports) + 1


def test_slow_disk_is_read_ahead(kitchen: Kitchen, saved: Saved) -> None:
    shutil.copy(saved.path, kitchen.directory / "guest.mapped")
    kitchen.cook("Restore fast from a slow disk")
    output = kitchen.running[-1].stdout
    assert output is not None
    lines = iter(output.readline, b"")
    assert next(line for line in lines if line.startswith(b"prefetch ")).split()[1] != b"0"


def test_stored_guest_is_read_by_drgn(kitchen: Kitchen, saved: Saved) -> None:
    pytest.importorskip("drgn")
    shutil.copy(saved.path, kitchen.directory / "guest.mapped")
    [printed] = kitchen.cook("Look into a stored guest that crashed")
    assert printed.endswith(f"{saved.memory['pc.ram'][0x7C00:0x7C04].hex()}\n")


def test_time_of_a_save_is_drawn(kitchen: Kitchen, saved: Saved) -> None:
    shutil.copy(saved.path, kitchen.directory / "guest.mapped")
    _, _, longest = kitchen.cook("See where the time of a save goes")
    assert (kitchen.directory / "save.svg").read_bytes().startswith(b"<svg ")
    assert len(longest.splitlines()) == 5
    assert " guest " in longest
