"""Ctrl-C and SIGTERM: exit code 130, and nothing half done is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyqmigrate import open_snapshot
from tests.harness.command import COMMAND, make_snapshot, pages

SIZE = 4 << 30  # seconds of writing, of which a few milliseconds happen
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def interrupted(
    arguments: list[str | Path],
    when: Callable[[int], bool],
    number: signal.Signals,
    environment: dict[str, str],
) -> tuple[int, str, str]:
    """Runs the command and sends it a signal as soon as ``when(pid)`` is true."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        deadline = time.monotonic() + 60
        while not when(process.pid):
            assert process.poll() is None, "it ended before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        sent = time.monotonic()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert time.monotonic() - sent < 10
    return process.returncode, out, err


def wrote(size: int) -> Callable[[int], bool]:
    def has_written(pid: int) -> bool:
        counters = dict(
            line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines()
        )
        return int(counters["write_bytes"]) > size

    return has_written


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_interrupted_pack_leaves_the_old_file(
    number: signal.Signals, disk: Path, child_environment: dict[str, str]
) -> None:
    make_snapshot(disk / "guest.mapped", {"old": pages(3)})
    (disk / "raw").touch()
    os.truncate(disk / "raw", SIZE)  # zeros, all of which are to be written
    code, out, err = interrupted(
        ["pack", disk / "guest.mapped", f"pc.ram={disk}/raw", "--sparse", "dense"],
        wrote(8 << 20),
        number,
        child_environment,
    )
    assert (code, out, err) == (130, "", "pyqmigrate: interrupted\n")
    assert sorted(path.name for path in disk.iterdir()) == ["guest.mapped", "raw"]
    with open_snapshot(disk / "guest.mapped") as snapshot:
        assert snapshot.blocks["old"].read(0, 3 * 4096) == pages(3)


def test_interrupt_is_an_error_in_json(disk: Path, child_environment: dict[str, str]) -> None:
    (disk / "raw").touch()
    os.truncate(disk / "raw", SIZE)
    code, out, _ = interrupted(
        ["pack", disk / "s", f"pc.ram={disk}/raw", "--sparse", "dense", "--json"],
        wrote(8 << 20),
        signal.SIGINT,
        child_environment,
    )
    assert code == 130
    assert json.loads(out)["error"]["type"] == "Interrupted"


def test_interrupted_demo_leaves_no_qemu_and_no_file(
    disk: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    # A QEMU that never says a word, so that the demo is waiting for it when the signal comes.
    fake = tmp_path / "qemu-system-x86_64"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo "QEMU emulator version 10.0.2"; exit; }\n'
        f"echo $$ > {tmp_path}/pid\nexec sleep 100\n"
    )
    fake.chmod(0o755)
    code, _, _ = interrupted(
        ["demo", "--size", "8MiB", "--dir", disk],
        lambda pid: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()),
        signal.SIGINT,
        child_environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert code == 130
    assert list(disk.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
