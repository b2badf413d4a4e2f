"""QEMU's own reader of migration files, analyze-migration.py, as a client.

There are two: of the QEMU that is installed, and of the newest whose source is available. A reader
from before QEMU 11 does not know mapped-ram files, not even QEMU's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.harness.unpacked import unpacked

__all__ = ["analyze", "analyzers"]


def analyzers(*, mapped_ram: bool) -> list[Path]:
    """The scripts, or those of them that know mapped-ram files."""
    scripts = sorted(unpacked("analyzer").glob("*.py"))
    assert scripts
    return [s for s in scripts if not mapped_ram or "mapped_ram" in s.read_text()]


def analyze(script: Path, path: Path, *arguments: str) -> dict[str, Any]:
    """What a script makes of a file, AssertionError when it cannot read it."""
    done = subprocess.run(
        [sys.executable, str(script), "-f", str(path), *arguments],
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{path.name}: {done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found
