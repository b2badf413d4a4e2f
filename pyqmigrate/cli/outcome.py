"""The outcome of a verb, and text that is safe to print.

Names come from untrusted files, so characters that could control a terminal are shown as escapes
(:func:`printable`).
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.errors import QemuError, SnapshotError
from pyqmigrate.format.printable import printable
from pyqmigrate.format.suffixes import SEAL
from pyqmigrate.io.place import absolute

__all__ = [
    "SCHEMA",
    "Outcome",
    "announce",
    "counted",
    "describe_error",
    "error_data",
    "json_text",
    "printable",
    "seal_data",
    "shown_error",
    "shown_seal",
    "table",
]

SCHEMA = 1  # the version of all JSON objects; docs/json.md


class Outcome(NamedTuple):
    """The result of a verb: ``data`` for ``--json``, ``lines`` for people, and the exit code.

    ``data`` is None for a verb that has already printed its result.
    """

    data: dict[str, Any] | None
    lines: Sequence[str]
    code: ExitCode = ExitCode.DONE


def json_text(data: Mapping[str, Any]) -> str:
    """Return the text that ``--json`` prints for ``data``, with a newline."""
    return json.dumps({"schema": SCHEMA, **data}, indent=2) + "\n"


def shown_seal(snapshot: str, seal: str) -> str:
    """Return the path of a seal, relative if the user gave a relative path of the snapshot."""
    named = f"{snapshot}{SEAL}"
    return named if os.fspath(absolute(named)) == seal else seal


def seal_data(path: object, algorithm: object, **more: object) -> dict[str, Any]:
    """Return the value of the key ``seal``."""
    return {"path": str(path), "algorithm": str(algorithm), **more}


def announce(args: argparse.Namespace, data: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Print the report of a verb that continues: JSON to standard output, or ``lines`` to standard
    error."""
    if args.json:
        print(json_text(data), end="", flush=True)
    elif not args.quiet:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def shown_error(error: BaseException) -> str:
    """Return :func:`describe_error`, safe to print. QEMU's texts keep their line breaks."""
    text = describe_error(error)
    if not isinstance(error, QemuError):
        return printable(text)
    return "\n".join(printable(line) for line in text.split("\n"))


def counted(number: int, noun: str) -> str:
    """Return ``1 channel``, ``2 channels``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> list[str]:
    """Return lines in columns; the first ``left`` columns are aligned left, the others right."""
    cells = [list(head), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    line = "  ".join(f"{{:{'<' if n < left else '>'}{width}}}" for n, width in enumerate(widths))
    return [line.format(*row).rstrip() for row in cells]


def describe_error(error: BaseException) -> str:
    """Return one sentence for people: what is wrong, and with which file."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError):
        return "not enough memory"
    # A note names the file if the error itself does not, or the reason.
    notes = "".join(getattr(error, "__notes__", ()))
    if isinstance(error, OSError) and error.strerror:
        missing = _missing(error)
        if missing is not None:
            return missing
        name = "" if error.filename is None else f": {os.fsdecode(error.filename)!r}"
        return f"{notes}{error.strerror}{name}"
    return f"{notes}{error}"


def _missing(error: OSError) -> str | None:
    """Return the sentence for a missing path: which part of it is missing.

    None for any other error, and if the path exists by now.
    """
    if error.errno not in (errno.ENOENT, errno.ENOTDIR) or error.filename is None:
        return None
    name = os.fsdecode(error.filename)
    # The text of a TargetError begins with the failed action.
    front = "".join((error.strerror or "").rpartition(": ")[:2])
    parents = [parent for parent in reversed(Path(name).parents) if not parent.is_dir()]
    if parents:
        missing = str(parents[0])
        if os.path.lexists(missing):
            return f"{front}{missing!r} is not a directory"
        return f"{front}no directory {str(Path(name).parent)!r}"
    if error.errno == errno.ENOTDIR and os.path.lexists(name):
        return f"{front}{name!r} is not a directory"
    if Path(name).is_symlink():
        return f"{front}{name!r} is a link to a file that is missing"
    if os.path.lexists(name):
        return None
    store, separator, stored = name.rpartition("#")
    note = f", and {store!r} is not a store" if store and separator and stored else ""
    return f"{front}no file {name!r}{note}"


def error_data(error: BaseException, code: ExitCode) -> dict[str, Any]:
    """Return the value of ``error`` in the JSON object of a failure."""
    data: dict[str, Any] = {
        "type": "Interrupted" if code is ExitCode.INTERRUPTED else type(error).__name__,
        "message": describe_error(error),
        "exit_code": int(code),
    }
    if isinstance(error, SnapshotError):
        data |= {"block": error.block, "field": error.field, "offset": error.offset}
    if isinstance(error, OSError):
        name = error.filename
        data |= {"errno": error.errno, "filename": None if name is None else os.fsdecode(name)}
    return data
