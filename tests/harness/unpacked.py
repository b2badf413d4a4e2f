"""Where .ci/ensure-system unpacks what tests use and nobody should have to install."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

__all__ = ["emulator", "fusermount", "lack", "newer_qemu", "qemu_img", "unpacked"]

_ROOT = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pyqmigrate-tests"


def unpacked(name: str) -> Path:
    """The root of the packages unpacked as ``name``: targets, linux, libvirt, crash, chromium, fuse
    or qemu-img."""
    root = _ROOT / name
    if not (root / ".complete").exists():
        lack(f"{root} is not there: run .ci/ensure-system qemu")
    return root


def emulator(target: str) -> str:
    """A QEMU for another target: the one that is installed, or the one unpacked."""
    program = f"qemu-system-{target}"
    return shutil.which(program) or str(unpacked("targets") / "usr/bin" / program)


def qemu_img() -> tuple[str, dict[str, str]]:
    """qemu-img, the one that is installed or the one unpacked, and the environment for it."""
    installed = shutil.which("qemu-img")
    if installed is not None:
        return installed, {**os.environ}
    root = unpacked("qemu-img")
    libraries = ":".join(str(path) for path in sorted(root.glob("usr/lib/*-linux-gnu")))
    return str(root / "usr/bin/qemu-img"), {**os.environ, "LD_LIBRARY_PATH": libraries}


def fusermount() -> Path:
    """fusermount3, the one that is installed or the one unpacked, which has no setuid bit."""
    installed = shutil.which("fusermount3")
    return Path(installed) if installed else unpacked("fuse") / "bin/fusermount3"


def newer_qemu() -> Path:
    """Where the QEMU of the development suite is, if .ci/ensure-system newer-qemu unpacked it."""
    return _ROOT / "newer-qemu" / "run" / "qemu-system-x86_64"


def lack(reason: str) -> NoReturn:
    """Skips the test, or fails it with CI=true, because its environment is not what it needs."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true, and {reason}", pytrace=False)
    pytest.skip(reason)
