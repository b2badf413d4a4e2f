"""The command ``pyqmigrate``: one module a verb; the only place that prints or exits.

Exit codes:

====  ================================================================
0     done
1     the snapshot is bad, or something differs
2     wrong usage
3     the system refused: space, permission, I/O
4     the guest or QEMU failed
5     not supported here
130   interrupted (Ctrl-C, SIGTERM, SIGHUP); nothing half done is left
====  ================================================================

With ``--json`` standard output gets one JSON object and nothing else. That of a failure has the
one key ``error``: an object of ``type``, ``message`` and ``exit_code``; ``block``, ``field`` and
``offset`` where a snapshot is bad; ``errno`` and ``filename`` where the system refused. The
message goes to standard error as well. In names, bytes that are not UTF-8 are lone surrogates
(Python's ``surrogateescape``). Keys may be added in later versions; none changes its meaning.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn, TextIO

from pyqmigrate.cli.arguments import BadArguments, Parser
from pyqmigrate.cli.exit_codes import ExitCode, exit_code
from pyqmigrate.cli.outcome import Outcome, error_data, shown_error
from pyqmigrate.errors import NotSupported, SnapshotError

__all__ = ["main"]

_VERBS = (
    "demo", "vm", "pack", "unpack", "info", "devices", "seal", "verify", "convert", "bench",
    "serve",
)
_EPILOG = """Exit codes: 0 done, 1 the snapshot is bad or something differs, 2 wrong usage,
3 the system refused (space, permission, I/O), 4 the guest or QEMU failed,
5 not supported here, 130 interrupted.
Sizes are written as 4096, 0x1000, 512M or 1GiB."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's arguments); return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    # Looked for by hand, so that a command line that does not parse is answered in the right form.
    as_json = "--json" in arguments[: arguments.index("--") if "--" in arguments else None]
    try:
        with _termination_interrupts():
            outcome = _run(arguments)
        if outcome is None:
            return ExitCode.DONE
        if outcome.data is not None:
            lines = "".join(f"{line}\n" for line in outcome.lines)
            _write(sys.stdout, _json(outcome.data) if as_json else lines)
        return outcome.code
    except BaseException as error:
        code = exit_code(error)
        if code is None:
            raise
        usage = error.usage if isinstance(error, BadArguments) else ""
        with contextlib.suppress(OSError):  # there is nowhere left to complain to
            _write(sys.stderr, f"{usage}pyqmigrate: {shown_error(error)}\n")
            if as_json:
                _write(sys.stdout, _json({"error": error_data(error, code)}))
        return code


def _run(arguments: Sequence[str]) -> Outcome | None:
    """What the verb hands back; None when argparse has printed what was asked for."""
    try:
        parsed = _parser().parse_args(arguments)
    except SystemExit:  # --help, --version: everything else raises BadArguments
        _write(sys.stdout, "")
        return None
    try:
        outcome: Outcome = parsed.run(parsed)
    except (SnapshotError, NotSupported) as error:
        if "snapshot" in parsed:
            error.add_note(f"{parsed.snapshot}: ")
        raise
    return outcome


def _parser() -> Parser:
    parser = Parser(
        prog="pyqmigrate", allow_abbrev=False, epilog=_EPILOG,
        description="Save, restore and look into the memory of QEMU virtual machines.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    parser.offer(__name__, _VERBS)
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: that takes longer than some verbs."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=settings.get("help"))

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        metadata = importlib.import_module("importlib.metadata")
        try:
            version = metadata.version("pyqmigrate")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        parser.exit(message=f"pyqmigrate {version}\n")


def _json(data: object) -> str:
    return json.dumps(data, indent=2) + "\n"


def _write(stream: TextIO, text: str) -> None:
    """Write all of it now. A reader that has gone away is no error: it has what it wanted."""
    encoding = stream.encoding or "ascii"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        # Python would fail once more on what is left in the buffer when it ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        if not isinstance(error, BrokenPipeError):
            raise


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP do what Ctrl-C does, unless the program around us, or nohup, has its own
    plans for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    taken = [
        number for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) == signal.SIG_DFL
    ]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
