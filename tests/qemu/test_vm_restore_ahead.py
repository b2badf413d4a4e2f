"""QEMU is started before the restore is checked, and waits: it has opened nothing if that is refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.vm import sync
from pyqmigrate.vm.incoming.early_start import start_early
from pyqmigrate.vm.incoming.instant_start import LoadedInstant
from pyqmigrate.vm.incoming.options import Mode, RestoreOptions
from tests.harness.command import COMMAND
from tests.harness.machine import BINARY
from tests.harness.saved import RAM, Saved, save_guest, serial_says

pytestmark = pytest.mark.qemu

M = str(RAM >> 20)
BACKEND = f"memory-backend-ram,id=pc.ram,size={M}M"
FILE = {"qom-type": "memory-backend-memfd", "id": "pc.ram", "size": RAM, "share": True}


IS_WRAPPER = Path(shutil.which(BINARY) or BINARY).read_bytes()[:4] != b"\x7fELF"


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    return save_guest(module_disk, ["-M", "pc", "-m", M])


@contextlib.contextmanager
def restored(path: Path, command: list[str] | None, *options: str) -> Iterator[dict[str, Any]]:
    """The report of ``vm restore``, whose QEMU runs; without a command line, that of the record."""
    words = [] if command is None else ["--", *command]
    with subprocess.Popen(
        [*COMMAND, "vm", "restore", "--json", *options, str(path), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "}\n")
            yield json.loads("".join(lines) + "}")
        finally:
            process.terminate()
            process.wait(60)


def words_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


def is_ahead(pid: int) -> bool:
    """Whether QEMU was started without the mapping of its memory, and got that later."""
    return not any("memory-backend-file" in word for word in words_of(pid))


@pytest.mark.parametrize(
    "machine",
    [
        ["-M", "pc", "-m", M],
        ["-M", "pc", "-m", M, "-mem-prealloc"],
        ["-M", "pc", "-m", M, "-incoming", "defer", "-S", "-daemonize"],
    ],
    ids=["plain", "prealloc", "incoming"],
)
def test_guest_goes_on(saved: Saved, tmp_path: Path, machine: list[str]) -> None:
    serial = tmp_path / "serial"
    options = ["--running"] if "-S" in machine else []
    with restored(saved.path, saved.command(*machine, serial=serial), *options) as report:
        assert (report["mode"], report["mapped_blocks"]) == ("instant", ["pc.ram"])
        assert is_ahead(report["pid"]) is not IS_WRAPPER
        first = len(saved.reports) + 1
        assert serial_says(serial, 2)[:2] == bytes([first, first + 1])


@pytest.mark.parametrize("backend", [BACKEND, json.dumps(FILE)], ids=["words", "JSON"])
def test_a_command_line_with_memory_backends_keeps_them(
    saved: Saved, tmp_path: Path, backend: str
) -> None:
    """They would be missing in the record of the next save."""
    machine = ["-M", "pc,memory-backend=pc.ram", "-m", M, "-object", backend]
    with restored(saved.path, saved.command(*machine, serial=tmp_path / "serial")) as report:
        assert (report["mode"], report["mapped_blocks"]) == ("instant", ["pc.ram"])
        assert not is_ahead(report["pid"])
        assert serial_says(tmp_path / "serial", 1)


def test_nothing_is_opened_if_the_restore_is_refused(saved: Saved, tmp_path: Path) -> None:
    serial, taken = tmp_path / "serial", tmp_path / "taken"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(taken))
        other.listen()
        command = [*COMMAND, "vm", "restore", str(saved.path), "--qmp", str(taken), "--"]
        command += [*saved.command(serial=serial), "-pidfile", str(tmp_path / "pid")]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert result.returncode == 2
        assert "another monitor listens at" in result.stderr
        assert os.listdir(tmp_path) == ["taken"]
    assert not running(str(serial))


def running(word: str) -> list[str]:
    """The processes with ``word`` in their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and word in (entry / "cmdline").read_text():
                found.append(entry.name)
    return found


def test_a_wrapper_runs_only_if_the_restore_is_not_refused(saved: Saved, tmp_path: Path) -> None:
    wrapper, mark = tmp_path / "qemu-system-x86_64", tmp_path / "mark"
    program, *words = saved.command(serial=tmp_path / "serial")
    wrapper.write_text(f'#!/bin/sh\necho started >> {mark}\nexec {shutil.which(program)} "$@"\n')
    wrapper.chmod(0o755)
    refused = [*COMMAND, "vm", "restore", str(saved.path), "--", str(wrapper), *words]
    result = subprocess.run([*refused, "-smp", "1", "-loadvm", "x"], capture_output=True)
    assert result.returncode == 2
    assert not mark.exists()
    with restored(saved.path, [str(wrapper), *words]) as report:
        assert report["mode"] == "instant"
    assert mark.read_text() == "started\n"


def test_a_snapshot_that_is_no_snapshot_leaves_no_qemu(saved: Saved, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(1 << 20))
    command = saved.command(serial=tmp_path / "serial")
    assert start(other, command) is None
    assert not running(str(tmp_path / "serial"))


def start(path: Path, command: list[str]) -> LoadedInstant | None:
    starting = start_early(
        str(path), command, RestoreOptions(mode=Mode.INSTANT, stdin=subprocess.DEVNULL)
    )
    assert starting is not None
    early = starting.result()
    if early is None:
        return None
    assert isinstance(early.started, LoadedInstant)
    early.end()
    return early.started


def test_what_is_started_is_ended(saved: Saved, tmp_path: Path) -> None:
    loaded = start(saved.path, saved.command(serial=tmp_path / "serial"))
    assert loaded is not None
    assert loaded.qemu.process.poll() is not None
    assert not running(str(tmp_path / "serial"))


@pytest.mark.parametrize(
    "machine",
    [
        ["-M", "pc", "-m", M],
        ["-M", "pc,memory-backend=pc.ram", "-m", M, "-object", BACKEND],
        ["-M", "pc", "-m", M, "-object", BACKEND, "-numa", "node,memdev=pc.ram"],
    ],
    ids=["plain", "backend", "NUMA"],
)
def test_guest_is_saved_again_and_restored_by_its_record(
    saved: Saved, tmp_path: Path, machine: list[str]
) -> None:
    again, monitor = tmp_path / "again", tmp_path / "qmp"
    command = saved.command(*machine, serial=tmp_path / "serial")
    with restored(saved.path, command, "--qmp", str(monitor)):
        sync.connect(monitor).save(again, then="quit")
    (tmp_path / "serial").unlink()
    with restored(again, None) as report:
        assert report["mode"] == "instant"
        assert serial_says(tmp_path / "serial", 1)
