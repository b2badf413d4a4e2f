# PYTHON_ARGCOMPLETE_OK
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

Standard descriptors that are closed are no error: ``/dev/null`` takes their places, and the exit
code says what became of the work.

With ``--json`` standard output gets one JSON object and nothing else. Its keys are those of
``docs/json.md``, ``schema`` the version of that. The object of a failure has ``error``: an object
of ``type``, ``message`` and ``exit_code``; ``block``, ``field`` and ``offset`` where a snapshot is
bad; ``errno`` and ``filename`` where the system refused. The message goes to standard error as
well. In names, bytes that are not UTF-8 are lone surrogates (Python's ``surrogateescape``). Keys
may be added in later versions; ``schema`` changes when one changes its meaning or goes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any, NoReturn, TextIO

from pyqmigrate import __version__
from pyqmigrate.cli.arguments import BadArguments, Parser, add_general
from pyqmigrate.cli.exit_codes import ExitCode, exit_code
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
    "pack",
    "unpack",
    "info",
    "devices",
    "seal",
    "verify",
    "convert",
    "bench",
    "serve",
)
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
    # Looked for by hand, so that a command line that does not parse is answered in the right form.
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
        with contextlib.suppress(OSError):  # there is nowhere left to complain to
            _write(sys.stderr, f"{usage}pyqmigrate: {shown_error(error)}\n")
            if as_json:
                stream = sys.stderr if _fills_stdout(parsed) else sys.stdout
                _write(stream, json_text({"error": error_data(error, code)}))
        return code


def _fills_stdout(parsed: argparse.Namespace | None) -> bool:
    """Whether standard output has what the verb wrote, so that no text may come between."""
    written = getattr(parsed, "writes", None)  # the argument that names it
    return written is not None and is_standard(getattr(parsed, written))


def _parse(arguments: Sequence[str]) -> argparse.Namespace | None:
    """The arguments; None when argparse has printed what was asked for."""
    try:
        parsed: argparse.Namespace = build_parser().parse_args(arguments)
    except SystemExit:  # --help, --version: everything else raises BadArguments
        _write(sys.stdout, "")
        return None
    return parsed


def _run(parsed: argparse.Namespace) -> Outcome:
    """What the verb hands back."""
    try:
        with configured(parsed), starting_threads():
            outcome: Outcome = parsed.run(parsed)
    except (SnapshotError, NotSupported) as error:
        if "snapshot" in parsed:
            error.add_note(f"{parsed.snapshot}: ")
        raise
    return replace(outcome, lines=()) if parsed.quiet else outcome


def build_parser() -> Parser:
    parser = Parser(
        prog="pyqmigrate",
        allow_abbrev=False,
        epilog=_EPILOG,
        description="Save, restore and look into the memory of QEMU virtual machines.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    add_general(parser)
    parser.set_defaults(json=False, verbose=False, quiet=False, no_progress=False)
    parser.offer(__name__, _VERBS)
    return parser


class _Version(argparse.Action):
    """Prints it and ends the command."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=settings.get("help"))

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"pyqmigrate {__version__}")
        parser.exit()


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
            raise OSError(error.errno, error.strerror, stream.name) from error


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
