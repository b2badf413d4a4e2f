"""Signals while ``vm restore`` and ``vm clone`` are at work: no QEMU is left, no guest has run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness.command import COMMAND
from tests.harness.saved import RAM, Saved, save_guest

pytestmark = pytest.mark.qemu

PC = ["-M", "pc", "-m", str(RAM >> 20)]
INTERRUPTED = (130, -signal.SIGINT)  # the same for a shell
# The command, which has a signal come when it calls this function of that module.
AT = """
import asyncio, importlib, os, sys, time
module, name, number = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
home = importlib.import_module(module)
original = getattr(home, name)
def with_signal(*arguments, **options):
    try:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
    except RuntimeError:  # in the thread of an instant restore, for which the main thread waits
        os.kill(os.getpid(), number)
        time.sleep(0.3)
    return original(*arguments, **options)
setattr(home, name, with_signal)
from pyqmigrate.cli import main
sys.exit(main(sys.argv[1:]))
"""

# The command, to which SIGTERM comes while asyncio is imported, in a call whose exceptions Python ignores,
# as it ignores those of the import system's own callbacks.
IN_IMPORT = """
import os, signal, sys
class Ignoring:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "asyncio":
            sys.meta_path.remove(self)
            Ignoring()
sys.meta_path.insert(0, Finder())
from pyqmigrate.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    return save_guest(module_disk, PC)


def living(word: Path) -> set[int]:
    """Processes with this word in their command line."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(word) in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except OSError:  # it has ended
            continue
    return found


def finished(process: subprocess.Popen[str], serial: Path) -> tuple[int, bytes]:
    """The exit code of a command that had a signal, and what its guest wrote to its serial port.

    AssertionError when a QEMU is left.
    """
    _, errors = process.communicate(timeout=60)
    assert not living(serial), "QEMU lives on"
    if process.returncode in INTERRUPTED:
        assert errors.rstrip().endswith("pyqmigrate: interrupted"), errors
    return process.returncode, serial.read_bytes() if serial.exists() else b""


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("verb", "module", "function"),
    [
        ("restore", "pyqmigrate.vm.incoming.attempt", "compare_blocks"),  # QEMU answers
        ("restore", "pyqmigrate.vm.incoming.loading", "_wait"),  # it loads
        ("restore", "pyqmigrate.vm.incoming.loading", "_run_state"),  # it has loaded
        ("clone", "pyqmigrate.vm.incoming.loading", "_wait"),
    ],
)
def test_signal_while_qemu_loads_ends_it_before_the_guest_runs(
    saved: Saved, tmp_path: Path, verb: str, module: str, function: str
) -> None:
    serial = tmp_path / "serial"
    options = ["--count", "1", "--dir", str(tmp_path)] if verb == "clone" else []
    for mode, number in [("load", signal.SIGTERM), ("instant", signal.SIGINT)]:
        # An instant restore of the command needs no event loop.
        early = mode == "instant" and verb == "restore" and function == "compare_blocks"
        process = start(
            [
                sys.executable,
                "-c",
                AT,
                "pyqmigrate.vm.incoming.instant_start" if early else module,
                function,
                str(int(number)),
                "vm",
                verb,
                *options,
                "--mode",
                mode,
                str(saved.path),
                "--",
                *saved.command(serial=serial),
            ]
        )
        code, ran = finished(process, serial)
        assert code in INTERRUPTED
        assert ran == b"", "the guest ran after the signal"


@pytest.mark.parametrize(
    ("number", "mode"),
    [(signal.SIGTERM, "load"), (signal.SIGINT, "instant"), (signal.SIGHUP, "load")],
)
def test_signal_from_outside_at_any_moment_leaves_no_guest(
    saved: Saved, tmp_path: Path, number: signal.Signals, mode: str
) -> None:
    """From the moment at which QEMU listens, until one comes too late."""
    interrupted = 0
    for turn, step in enumerate([0, 0, 0, 0, 1, 2, 3]):  # an instant restore may win the first ones
        serial, monitor = tmp_path / f"serial-{turn}", tmp_path / f"monitor-{turn}"
        process = start(
            [
                *COMMAND,
                "vm",
                "restore",
                "--mode",
                mode,
                "--qmp",
                str(monitor),
                str(saved.path),
                "--",
                *saved.command(serial=serial),
            ]
        )
        while not monitor.exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(0.01 * step)
        process.send_signal(number)
        code, ran = finished(process, serial)
        assert not monitor.exists(), "its socket is left"
        if code not in INTERRUPTED:
            assert code == 0  # the guest was there: QEMU had the signal, and ended
            if interrupted:
                break
            continue
        assert ran == b"", "the guest ran after the signal"
        interrupted += 1
    assert interrupted, "no signal came in time: the test proves nothing"


def test_signal_while_the_event_loop_is_imported_reaches_the_guest(
    saved: Saved, tmp_path: Path
) -> None:
    serial = tmp_path / "serial"
    words = ["vm", "restore", str(saved.path), "--", *saved.command(serial=serial)]
    process = start([sys.executable, "-c", IN_IMPORT, *words])
    try:
        assert finished(process, serial)[0] == 0
    finally:
        process.terminate()


def test_hangup_that_is_ignored_ends_nothing(saved: Saved, tmp_path: Path) -> None:
    """As nohup has it."""
    serial = tmp_path / "serial"
    process = start(
        ["nohup", *COMMAND, "vm", "restore", str(saved.path), "--", *saved.command(serial=serial)]
    )
    assert process.stderr is not None
    while not process.stderr.readline().startswith("restored"):
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    length = len(serial.read_bytes())
    deadline = time.monotonic() + 30
    while len(serial.read_bytes()) < length + 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    assert finished(process, serial)[0] == 0
