"""The command line of a QEMU that runs, as its process shows it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pyqmigrate.vm.qemu.redaction import redact

__all__ = ["ProcessCommand", "read_command"]

_DAEMON = {"-daemonize", "--daemonize"}


class ProcessCommand(NamedTuple):
    """``words`` without secrets, None where they cannot be read; ``redacted`` are the numbers of
    those that had one. ``directory`` is where relative names start, None where that cannot be told.
    """

    words: tuple[str, ...] | None
    redacted: tuple[int, ...]
    directory: str | None


def read_command(pid: int | None) -> ProcessCommand:
    """The command line of process ``pid``. Raises nothing: what cannot be read is None."""
    if pid is None:
        return ProcessCommand(None, (), None)
    process = Path(f"/proc/{pid}")
    try:
        text = (process / "cmdline").read_bytes()
    except OSError:
        text = b""
    if not text:  # no process any more, or a zombie
        return ProcessCommand(None, (), _directory(process, daemon=False))
    words = [os.fsdecode(word) for word in text.removesuffix(b"\0").split(b"\0")]
    return ProcessCommand(*redact(words), _directory(process, daemon=bool(_DAEMON & {*words})))


def _directory(process: Path, *, daemon: bool) -> str | None:
    """A QEMU that made itself a daemon has gone to ``/`` when it had read its command line."""
    try:
        if daemon:
            for line in (process / "environ").read_bytes().split(b"\0"):
                if line.startswith(b"PWD=/"):
                    return os.fsdecode(line[4:])
            return None
        return os.fspath((process / "cwd").readlink())
    except OSError:
        return None
