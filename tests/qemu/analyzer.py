"""QEMU's own reader of migration files, analyze-migration.py, as a client."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.qemu.unpacked import unpacked

__all__ = ["analyze"]


def analyze(path: Path) -> dict[str, Any]:
    """What the script makes of a file, AssertionError when it cannot read it."""
    script = unpacked("analyzer") / "analyze-migration.py"
    done = subprocess.run(
        [sys.executable, str(script), "-f", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{path.name}: {done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found
