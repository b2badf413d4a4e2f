"""The processes behind a guest that runs from a private mount."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from pyqmigrate.io.input import InputFile
from pyqmigrate.mount.view import MountedView

__all__ = ["PATIENCE", "keepers", "worker_of"]

PATIENCE = 20.0  # seconds


def keepers(runtime: Path) -> list[str]:
    """Return the processes that have a directory of ``runtime`` on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(runtime).encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
    return found


def worker_of(source: InputFile) -> int:
    """Return the worker of the mount through which a file is open; wait until there is one."""
    assert source.view is not None
    view = source.view.view
    assert isinstance(view, MountedView)
    deadline = time.monotonic() + PATIENCE
    while not (worker := view.status()["worker"]):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return int(worker)
