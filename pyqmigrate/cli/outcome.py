"""What a verb hands back for printing, and text that is safe to print.

Names come from files that nobody vouches for: whatever a terminal could act on is shown as an
escape (:func:`printable`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.errors import QemuError, SnapshotError

__all__ = [
    "Outcome", "counted", "describe_error", "error_data", "printable", "shown_error", "table",
]


@dataclass(frozen=True)
class Outcome:
    """The result of a verb: ``data`` for ``--json``, ``lines`` for people, and the exit code.

    ``data`` is None for a verb that has printed it already.
    """

    data: dict[str, Any] | None
    lines: Sequence[str]
    code: ExitCode = ExitCode.DONE


def printable(text: str) -> str:
    r"""``text`` with control characters, lone surrogates and invisible ones as ``\x1b`` escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def shown_error(error: BaseException) -> str:
    """:func:`describe_error`, safe to print. What QEMU wrote stays in its lines."""
    text = describe_error(error)
    if not isinstance(error, QemuError):
        return printable(text)
    return "\n".join(printable(line) for line in text.split("\n"))


def counted(number: int, noun: str) -> str:
    """``1 channel``, ``2 channels``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> list[str]:
    """Lines in columns, the first ``left`` of them flush left, the others right."""
    cells = [list(head), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if n < left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def describe_error(error: BaseException) -> str:
    """One sentence for people: what was wrong, and with which file."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f": {os.fsdecode(error.filename)!r}"
        return f"{error.strerror}{name}"
    # A note is the file that the error itself does not name.
    return "".join([*getattr(error, "__notes__", ()), str(error)])


def error_data(error: BaseException, code: ExitCode) -> dict[str, Any]:
    """The value of ``error`` in the JSON object of a failure."""
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
