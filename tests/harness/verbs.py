"""``pyqmigrate vm save`` and ``vm restore``, run as a user runs them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["restored", "save"]

_ROOT = Path(__file__).parents[2]
_VM = [sys.executable, "-m", "pyqmigrate", "vm"]


def save(qmp: Path, snapshot: Path, *options: str, limit: float = 120) -> dict[str, Any]:
    """``vm save``; returns its JSON. AssertionError when it fails."""
    done = subprocess.run(
        [*_VM, "save", "--json", "--qmp", str(qmp), str(snapshot), *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
        cwd=_ROOT,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return dict(json.loads(done.stdout))


@contextlib.contextmanager
def restored(
    snapshot: Path | str, command: Sequence[str], *options: str, limit: float = 60
) -> Iterator[dict[str, Any]]:
    """``vm restore``; gives its JSON as soon as the guest is there, and ends both on exit."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*_VM, "restore", "--json", str(snapshot), *options, "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            cwd=_ROOT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + limit
            while (report := _object(_content(output.fileno()))) is None or "error" in report:
                failed = process.poll() is not None or time.monotonic() > deadline
                assert not failed, (_content(output.fileno()), _content(errors.fileno()))
                time.sleep(0.01)
            yield report
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _content(fd: int) -> str:
    return os.pread(fd, 1 << 20, 0).decode(errors="replace")


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that the text begins with; None while it is not whole."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError:
        return None
    return dict(value)
