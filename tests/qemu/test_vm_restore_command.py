"""``pyqmigrate vm restore`` and ``vm clone``: in the foreground until QEMU ends."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.qmp.client import QmpClient
from tests.harness.command import COMMAND
from tests.harness.saved import RAM, Saved, save_guest, serial_says

pytestmark = pytest.mark.qemu

PC = ["-M", "pc", "-m", str(RAM >> 20)]


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    return save_guest(module_disk, PC)


@pytest.fixture
def started(child_environment: dict[str, str]) -> Iterator[Any]:
    """Starts the command with these arguments; whatever is left of it is ended."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, "vm", *map(str, arguments)],
            env=child_environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started holds its pipes too
        process.communicate()


def monitor(path: Path) -> QmpClient:
    deadline = time.monotonic() + 30
    while True:
        try:
            return QmpClient.connect(path)
        except OSError:
            assert time.monotonic() < deadline, f"nobody listens at {path}"
            time.sleep(0.01)


def test_guest_goes_on_until_qemu_is_asked_to_end(
    saved: Saved, started: Any, tmp_path: Path
) -> None:
    serial, socket = tmp_path / "serial", tmp_path / "qmp"
    process = started("restore", saved.path, "--qmp", socket, "--", *saved.command(serial=serial))
    reports = len(saved.reports)
    assert serial_says(serial, 2)[:2] == bytes([reports + 1, reports + 2])
    with monitor(socket) as qmp:
        qmp.execute("quit")
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert out == ""
    assert errors.startswith("restored  instant: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_qemu_and_then_the_command(
    saved: Saved, started: Any, tmp_path: Path, number: int
) -> None:
    serial = tmp_path / "serial"
    process = started("restore", saved.path, "--", *saved.command(serial=serial))
    serial_says(serial, 1)
    process.stderr.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert f"terminating on signal {int(number)}" in errors


def living(word: Path) -> list[int]:
    """Processes other than zombies with this word in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(word) in (entry / "cmdline").read_text(errors="replace"):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(entry.name)] * (state != "Z")
    return found


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_qemu_does_not_outlive_a_restore_that_is_killed(
    saved: Saved, started: Any, tmp_path: Path, mode: str
) -> None:
    """It is killed as soon as QEMU listens; if the guest was there before that, it goes on."""
    for number in range(4):
        serial, socket = tmp_path / f"serial-{number}", tmp_path / f"qmp-{number}"
        process = started(
            "restore",
            saved.path,
            "--mode",
            mode,
            "--qmp",
            socket,
            "--",
            *saved.command(serial=serial),
        )
        while not socket.exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 5
        while pids := living(serial):
            if time.monotonic() > deadline:
                with monitor(socket) as qmp:
                    assert qmp.execute("query-status")["status"] == "running"
                    qmp.execute("quit")
                break
            time.sleep(0.01)
        else:
            return
        assert len(pids) == 1
    raise AssertionError("no kill came in time: the test proves nothing")


def test_qemu_that_was_started_a_moment_ago_ends_with_a_restore_that_is_killed(
    saved: Saved, started: Any, tmp_path: Path
) -> None:
    """Before it has read what monitor it is to have.

    It is on the lifeline a moment after it is there. Until then it is the description of the monitor
    that ends a QEMU, as that is cut short; the wrapper reads none.
    """
    wrapper, begun = tmp_path / "wrapper", tmp_path / "begun"
    wrapper.write_text(f"#!/bin/sh\n: > {begun}\nread _ < {tmp_path}/never\nexec false\n")
    wrapper.chmod(0o755)
    os.mkfifo(tmp_path / "never")
    process = started("restore", saved.path, "--", wrapper, *saved.command(serial=tmp_path)[1:])
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(0.5)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while living(wrapper):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.01)


def test_guest_outlives_a_command_that_is_killed_later(
    saved: Saved, started: Any, tmp_path: Path
) -> None:
    serial, socket = tmp_path / "serial", tmp_path / "qmp"
    process = started("restore", saved.path, "--qmp", socket, "--", *saved.command(serial=serial))
    process.stderr.readline()
    process.kill()
    process.wait()
    serial_says(serial, len(serial.read_bytes()) + 3)
    with monitor(socket) as qmp:
        qmp.execute("quit")


def test_json_is_there_as_soon_as_the_guest_is(saved: Saved, started: Any, tmp_path: Path) -> None:
    command = saved.command(serial=tmp_path / "serial")
    process = started("restore", saved.path, "--json", "--paused", "--mode", "load", "--", *command)
    lines = []
    while not lines or lines[-1] != "}\n":
        lines.append(process.stdout.readline())
    report = json.loads("".join(lines))
    assert report["mode"] == "load"
    assert report["run_state"] == "paused"
    assert Path(f"/proc/{report['pid']}").exists()
    process.terminate()
    assert process.communicate(timeout=30)[0] == ""


def test_qemu_that_is_killed_is_an_error(saved: Saved, started: Any, tmp_path: Path) -> None:
    socket = tmp_path / "qmp"
    command = saved.command(serial=tmp_path / "serial")
    process = started("restore", saved.path, "--paused", "--qmp", socket, "--", *command)
    with monitor(socket) as qmp:
        process.stderr.readline()
        pid = qmp.execute("query-cpus-fast")[0]["thread-id"]
        subprocess.run(["kill", "-KILL", str(pid)], check=True)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 4
    assert "killed by signal 9" in errors


def test_json_stays_one_object_when_qemu_ends_badly(
    saved: Saved, started: Any, tmp_path: Path
) -> None:
    serial = tmp_path / "serial"
    process = started("restore", saved.path, "--json", "--", *saved.command(serial=serial))
    serial_says(serial, 1)
    (pid,) = (pid for pid in living(serial) if pid != process.pid)
    while not (line := process.stdout.readline()).startswith("}"):
        assert line
    os.kill(pid, signal.SIGKILL)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 4
    assert out == ""
    assert "killed by signal 9" in errors


def test_json_of_a_restore_that_fails_is_one_error(
    saved: Saved, started: Any, tmp_path: Path
) -> None:
    command = saved.command(*PC, "-device", "no-such-device", serial=tmp_path / "serial")
    process = started("restore", saved.path, "--json", "--", *command)
    out, _ = process.communicate(timeout=60)
    assert json.loads(out)["error"]["exit_code"] == process.returncode == 4


def test_failure_shows_what_qemu_wrote_once(saved: Saved, started: Any, tmp_path: Path) -> None:
    command = saved.command(*PC, "-device", "no-such-device", serial=tmp_path / "serial")
    process = started("restore", saved.path, "--", *command)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4
    assert errors.count("no-such-device: ") == 1


def test_wrong_machine_is_wrong_usage(saved: Saved, started: Any, tmp_path: Path) -> None:
    command = saved.command("-M", "q35", "-m", PC[-1], serial=tmp_path / "serial")
    process = started("restore", saved.path, "--", *command)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "machine type pc-i440fx-" in errors


def test_clones_are_listed_and_end_together(saved: Saved, started: Any, tmp_path: Path) -> None:
    process = started(
        "clone",
        saved.path,
        "--count",
        "3",
        "--dir",
        tmp_path,
        "--json",
        "--",
        *saved.command(serial=tmp_path / "serial-{n}"),
    )
    lines = []
    while not lines or lines[-1] != "}\n":
        lines.append(process.stdout.readline())
    guests = json.loads("".join(lines))["guests"]
    assert [guest["number"] for guest in guests] == [1, 2, 3]
    for guest in guests:
        with monitor(Path(guest["qmp"])) as qmp:
            assert qmp.execute("query-status")["running"]
        serial_says(tmp_path / f"serial-{guest['number']}", 1)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert not any(Path(f"/proc/{guest['pid']}").exists() for guest in guests)


def test_clone_that_fails_is_named_and_changes_the_exit_code(
    saved: Saved, started: Any, tmp_path: Path
) -> None:
    (tmp_path / "1").mkdir()
    process = started(
        "clone",
        saved.path,
        "--count",
        "2",
        "--dir",
        tmp_path,
        "--",
        *saved.command(serial=tmp_path / "{n}" / "serial"),
    )
    serial_says(tmp_path / "1" / "serial", 1)
    while not process.stderr.readline().startswith("guest 2: "):
        assert process.poll() is None
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 4


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_descriptors_of_the_shell_are_qemus(
    saved: Saved, child_environment: dict[str, str], tmp_path: Path, mode: str
) -> None:
    serial = tmp_path / "serial"
    command = saved.command(
        *PC, "-add-fd", "fd=5,set=3", "-chardev", "socket,id=c,fd=6", serial=serial
    )
    script = f'exec 5</dev/null; exec "$@" --mode {mode} -- {shlex.join(command)}'
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [
                "bash",
                "-c",
                f"exec 6<&{theirs.fileno()}; {script}",
                "bash",
                *COMMAND,
                "vm",
                "restore",
                str(saved.path),
            ],
            env=child_environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith(f"restored  {mode}: ")
        finally:
            process.terminate()
            process.communicate()


def test_configuration_through_a_pipe_is_read_by_qemu_alone(
    saved: Saved, child_environment: dict[str, str], tmp_path: Path
) -> None:
    """It could describe memory: that is not looked into, so memory is not mapped."""
    command = shlex.join(saved.command(serial=tmp_path / "serial"))
    text = '[chardev "null"]\\n backend = "null"\\n'
    process = subprocess.Popen(
        [
            "bash",
            "-c",
            f"exec \"$@\" -- {command} -readconfig <(printf '{text}')",
            "bash",
            *COMMAND,
            "vm",
            "restore",
            str(saved.path),
        ],
        env=child_environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said.startswith("restored  lazy: ")
        assert "is not a regular file" in said
    finally:
        process.terminate()
        process.communicate()
