"""File systems on loop devices."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache

__all__ = ["why_not"]


def _unshare() -> list[str]:
    return ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]


@cache
def why_not() -> str | None:
    """Why nothing can be mounted; None if it can."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    done = subprocess.run(
        [*_unshare(), "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True
    )
    return None if done.returncode == 0 else f"cannot mount: {done.stderr.strip()}"
