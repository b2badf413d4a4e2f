"""The version of the QEMU at hand: for what one version does and another does not."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess

from tests.qemu.machine import BINARY

__all__ = ["qemu_version"]


@functools.cache
def qemu_version() -> tuple[int, int]:
    """Major and minor of the QEMU on the PATH; zeros where there is none, or it does not tell."""
    if shutil.which(BINARY) is None:
        return 0, 0
    output = subprocess.run([BINARY, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", output)
    return (int(found[1]), int(found[2])) if found else (0, 0)
