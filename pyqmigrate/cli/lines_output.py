"""Results that are printed one by one, while a verb still works: lines for people, or JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from pyqmigrate.cli.outcome import SCHEMA

__all__ = ["LinesOutput", "json_line"]

_BUFFERED = 64 << 10  # characters


def json_line(data: Mapping[str, Any]) -> str:
    """Return a JSON object in one line, with its newline."""
    return json.dumps({"schema": SCHEMA, **data}) + "\n"


class LinesOutput:
    """Standard output, for many lines. ``closed`` says that its reader has gone, which is not an error:
    nothing more need be found. Close it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._json, self._quiet = args.json, args.quiet
        self._at_once = sys.stdout.isatty()
        self._lines: list[str] = []
        self._length = 0
        self.closed = False

    def put(self, data: Mapping[str, Any], line: str) -> None:
        """Print one result: ``data`` with ``--json``, else ``line``."""
        if self._json:
            self._add(json_line(data))
        elif not self._quiet:
            self._add(line + "\n")

    def _add(self, text: str) -> None:
        self._lines.append(text)
        self._length += len(text)
        if self._at_once or self._length >= _BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered. Raises OSError."""
        text = "".join(self._lines)
        self._lines.clear()
        self._length = 0
        if self.closed or not text:
            return
        encoding = sys.stdout.encoding or "ascii"
        try:
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()
        except OSError as error:
            # Otherwise Python would fail again at exit, with the rest of the buffer.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
            if not isinstance(error, BrokenPipeError):
                raise OSError(error.errno, error.strerror, sys.stdout.name) from error
            self.closed = True
