# PYTHON_ARGCOMPLETE_OK
"""The command ``pyqmigrate``: one module for each verb; the only package that prints or exits.

Exit codes:

====  ================================================================
0     done
1     the snapshot is bad, or something differs
2     wrong usage
3     the system refused: space, permission, I/O
4     the guest or QEMU failed
5     not supported here
130   interrupted (Ctrl-C, SIGTERM, SIGHUP); nothing incomplete is left
====  ================================================================

Closed standard descriptors are not an error: ``/dev/null`` replaces them, and the exit code reports
the result of the work.

With ``--json`` standard output gets one JSON object and nothing else. ``docs/json.md`` lists its
keys; ``schema`` is the version of that list. After a failure the object has ``error``: an object of
``type``, ``message`` and ``exit_code``; ``block``, ``field`` and ``offset`` for a bad snapshot;
``errno`` and ``filename`` if the system refused. The message goes to standard error as well. Bytes
of names that are not UTF-8 are lone surrogates (Python's ``surrogateescape``). Later versions may
add keys; ``schema`` changes when a key is removed or changes its meaning.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn, TextIO

from pyqmigrate import __version__
from pyqmigrate.cli.arguments import BadArguments, Parser, RawHelpFormatter, add_general
from pyqmigrate.cli.exit_codes import ExitCode, exit_code
from pyqmigrate.cli.lines_output import json_line
from pyqmigrate.cli.missing_streams import fill_missing_streams
from pyqmigrate.cli.outcome import Outcome, error_data, json_text, shown_error
from pyqmigrate.cli.standard_streams import is_standard
from pyqmigrate.cli.verbosity import configured
from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.io.threads import starting_threads

__all__ = ["build_parser", "main"]

_VERBS = (
    "demo",
    "vm",
    "fleet",
    "pack",
    "unpack",
    "info",
    "devices",
    "seal",
    "verify",
    "diff",
    "find",
    "strings",
    "read",
    "map",
    "convert",
    "compact",
    "store",
    "mount",
    "umount",
    "page-server",
    "bench",
    "serve",
)
_VERSION = "--version"
_EPILOG = """Exit codes: 0 done, 1 the snapshot is bad or something differs, 2 wrong usage,
3 the system refused (space, permission, I/O), 4 the guest or QEMU failed,
5 not supported here, 130 interrupted.
Sizes are written as 4096, 0x1000, 512M or 1GiB."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's arguments); return its exit code."""
    if "_ARGCOMPLETE" in os.environ:
        from pyqmigrate.cli.completion import complete

        return complete(build_parser())
    fill_missing_streams()
    arguments = sys.argv[1:] if argv is None else list(argv)
    # Searched by hand: an error in the rest of the command line is reported in the right form, too.
    as_json = "--json" in arguments[: arguments.index("--") if "--" in arguments else None]
    parsed = None
    try:
        with _termination_interrupts():
            parsed = _parse(arguments)
            if parsed is None:
                return ExitCode.DONE
            outcome = _run(parsed)
        if outcome.data is not None:
            lines = "".join(f"{line}\n" for line in outcome.lines)
            stream = sys.stderr if _fills_stdout(parsed) else sys.stdout
            _write(stream, json_text(outcome.data) if as_json else lines)
        return outcome.code
    except BaseException as error:
        code = exit_code(error)
        if code is None:
            raise
        usage = error.usage if isinstance(error, BadArguments) else ""
        with contextlib.suppress(OSError):  # standard error is the last place to report to
            _write(sys.stderr, f"{usage}pyqmigrate: {shown_error(error)}\n")
            if as_json:
                stream = sys.stderr if _fills_stdout(parsed) else sys.stdout
                # A verb with a result in many lines fails in one, too.
                text = json_line if getattr(parsed, "json_lines", False) else json_text
                _write(stream, text({"error": error_data(error, code)}))
        return code


def _fills_stdout(parsed: argparse.Namespace | None) -> bool:
    """Return whether the verb writes its result to standard output, where no text may follow."""
    written = getattr(parsed, "writes", None)  # the argument that names the output
    return written is not None and is_standard(getattr(parsed, written))


def _parse(arguments: Sequence[str]) -> argparse.Namespace | None:
    """Return the arguments; None if argparse has printed the help or the version."""
    if arguments and arguments[0] == _VERSION:  # without the parsers of all verbs
        _write(sys.stdout, f"pyqmigrate {__version__}\n")
        return None
    try:
        parsed: argparse.Namespace = build_parser().parse_args(arguments)
    except SystemExit:  # --help, --version: everything else raises BadArguments
        _write(sys.stdout, "")
        return None
    return parsed


def _run(parsed: argparse.Namespace) -> Outcome:
    """Run the verb and return its outcome."""
    try:
        with configured(parsed), starting_threads():
            outcome: Outcome = parsed.run(parsed)
    except (SnapshotError, NotSupported) as error:
        if "snapshot" in parsed:
            error.add_note(f"{parsed.snapshot}: ")
        raise
    return outcome._replace(lines=()) if parsed.quiet else outcome


def build_parser() -> Parser:
    parser = Parser(
        prog="pyqmigrate",
        allow_abbrev=False,
        epilog=_EPILOG,
        description="Save, restore and look into the memory of QEMU virtual machines.",
        formatter_class=RawHelpFormatter,
    )
    parser.add_argument(_VERSION, action=_Version, help="show the version and exit")
    add_general(parser)
    parser.set_defaults(json=False, verbose=False, quiet=False, no_progress=False)
    parser.offer(__name__, _VERBS)
    return parser


class _Version(argparse.Action):
    """Print the version and end the command."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=settings.get("help"))

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"pyqmigrate {__version__}")
        parser.exit()


def _write(stream: TextIO, text: str) -> None:
    """Write ``text`` and flush it. A reader that has closed the pipe early is not an error."""
    encoding = stream.encoding or "ascii"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        # Otherwise Python would fail again at exit, with the rest of the buffer.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, stream.name) from error


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt, unless the calling program or nohup handles
    them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    taken = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) == signal.SIG_DFL
    ]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
