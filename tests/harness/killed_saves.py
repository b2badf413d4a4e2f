"""A save by the command on a file system of its own, and what is left when it is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyqmigrate import open_snapshot
from tests.harness.saving import ROOT, Source

__all__ = ["BLIND", "OLD", "UNSHARE", "assert_old_or_whole", "save_on", "wait_for_touch"]

OLD = b"what was there before"
UNSHARE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
# The command, on a file system that does not tell how full it is.
BLIND = """
import sys
from pyqmigrate.cli import main
from pyqmigrate.io.output import OutputFile
OutputFile.free_bytes = lambda self: None
sys.exit(main(sys.argv[1:]))
"""


def assert_old_or_whole(path: Path) -> None:
    """The name shows what it showed, or a whole snapshot; then it shows the old one again."""
    with path.open("rb") as file:
        if file.read(len(OLD)) == OLD:
            return
    with open_snapshot(path) as snapshot:
        snapshot.verify()
    path.write_bytes(OLD)


def save_on(
    guest: Source, file_system: str, *arguments: str, blind: bool = False
) -> tuple[int, str, list[str]]:
    """Save on a file system that only the command sees: exit code, standard error, files left."""
    place = guest.directory / "mounted"
    place.mkdir()
    guest.files.add("mounted")
    if subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace is not available")
    script = (
        f'mount -t {file_system} none "$1"; place="$1"; shift; "$@" || echo "$?"; ls -A "$place"'
    )
    python = ["-c", BLIND] if blind else ["-m", "pyqmigrate"]
    result = subprocess.run(
        [
            *UNSHARE,
            "sh",
            "-ec",
            script,
            "sh",
            str(place),
            sys.executable,
            *python,
            "vm",
            "save",
            "--qmp",
            str(guest.socket),
            *arguments,
            str(place / "snapshot"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = result.stdout.splitlines()
    code = int(lines.pop(0)) if lines and lines[0].isdecimal() else 0
    return code, result.stderr, lines


def wait_for_touch(guest: Source) -> None:
    """Until a save is at work on QEMU."""
    deadline = time.monotonic() + 20
    while not guest.vm.execute("query-fdsets"):
        assert time.monotonic() < deadline, "the save does not begin"
