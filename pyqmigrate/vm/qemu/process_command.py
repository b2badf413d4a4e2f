"""The command line of a running QEMU, read from /proc."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pyqmigrate.vm.qemu.redaction import redact

__all__ = ["ProcessCommand", "read_command"]

_DAEMON = {"-daemonize", "--daemonize"}


class ProcessCommand(NamedTuple):
    """The ``words`` without secrets, None if unreadable, and the numbers of the ``redacted`` ones.

    ``directory`` is the one that relative names start from, None if unknown.
    """

    words: tuple[str, ...] | None
    redacted: tuple[int, ...]
    directory: str | None


def read_command(pid: int | None) -> ProcessCommand:
    """Return the command line of process ``pid``. Never raises: unreadable parts are None."""
    if pid is None:
        return ProcessCommand(None, (), None)
    process = Path(f"/proc/{pid}")
    try:
        text = (process / "cmdline").read_bytes()
    except OSError:
        text = b""
    if not text:  # the process has ended, or is a zombie
        return ProcessCommand(None, (), _directory(process, daemon=False))
    words = [os.fsdecode(word) for word in text.removesuffix(b"\0").split(b"\0")]
    return ProcessCommand(*redact(words), _directory(process, daemon=bool(_DAEMON & {*words})))


def _directory(process: Path, *, daemon: bool) -> str | None:
    """Return where relative names start. A daemon went to ``/`` after reading its command line."""
    try:
        if daemon:
            for line in (process / "environ").read_bytes().split(b"\0"):
                if line.startswith(b"PWD=/"):
                    return os.fsdecode(line[4:])
            return None
        return os.fspath((process / "cwd").readlink())
    except OSError:
        return None
