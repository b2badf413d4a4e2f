"""File systems on loop devices, made for one measurement. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.results import GIB

__all__ = ["KINDS", "mounted", "why_not"]

# btrfs writes directly only to files without checksums: those made in a directory with this attribute.
KINDS = ("ext4", "xfs", "btrfs", "btrfs nodatacow")
_MAKE = {"ext4": ["-q", "-F"], "xfs": ["-q", "-f"], "btrfs": ["-q", "-f"]}


def why_not(kind: str) -> str | None:
    """Why a file system of this kind cannot be made here; None if it can."""
    if os.geteuid() != 0:
        return "loop devices need root"
    for program in (f"mkfs.{kind.split()[0]}", "losetup", "mount", "chattr"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return None


@contextlib.contextmanager
def mounted(kind: str, directory: Path, size: int = 3 * GIB) -> Iterator[Path]:
    """Mount a new file system whose image, a sparse file of ``size`` bytes in ``directory``, is read and
    written directly; it and the image are gone afterwards."""
    base, _, option = kind.partition(" ")
    with contextlib.ExitStack() as stack:
        name = tempfile.mkdtemp(prefix=f"{base}-", dir=directory)
        stack.callback(shutil.rmtree, name)
        image, place = Path(name) / "image", Path(name) / "mounted"
        place.mkdir()
        with image.open("wb") as file:
            file.truncate(size)
        loop = _run("losetup", "--direct-io=on", "--find", "--show", image).strip()
        try:
            _run(f"mkfs.{base}", *_MAKE[base], loop)
            _run("mount", loop, place)
        finally:
            _run("losetup", "--detach", loop)  # which the kernel does when it is unmounted
        # A contender that is ended early may have a file open for a moment more.
        stack.callback(_run, "umount", "--lazy", place)
        inner = place / "bench"
        inner.mkdir()
        if option:
            _run("chattr", "+C", inner)
        yield inner


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {done.stderr.strip()}")
    return done.stdout
