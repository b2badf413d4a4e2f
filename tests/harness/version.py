"""The version of the QEMU at hand: for what one version does and another does not."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess

import pytest

from tests.harness.machine import BINARY
from tests.harness.unpacked import lack, newer_qemu

__all__ = ["program_of", "qemu_version"]


@functools.cache
def qemu_version() -> tuple[int, int]:
    """Major and minor of the QEMU on the PATH; zeros where there is none, or it does not tell."""
    return _version_of(BINARY)


def program_of(version: tuple[int, int]) -> str:
    """A QEMU of that version: the one on the PATH, or the newer one that was unpacked."""
    candidates = [BINARY, str(newer_qemu())]
    for program in candidates:
        if _version_of(program) == version:
            return program
    if shutil.which(BINARY) is None:
        lack(f"no {BINARY} on the PATH: answers cannot be compared")
    wanted = ".".join(map(str, version))
    pytest.skip(f"no QEMU {wanted}: see .ci/ensure-system qemu and newer-qemu")


@functools.cache
def _version_of(program: str) -> tuple[int, int]:
    if shutil.which(program) is None:
        return 0, 0
    output = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", output)
    return (int(found[1]), int(found[2])) if found else (0, 0)
