"""The parser, and the arguments that several verbs have."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

from pyqmigrate.cli.sizes import read_size
from pyqmigrate.errors import UsageError
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.io.channels import MAX_CHANNELS, check_channels
from pyqmigrate.io.direct_io import DirectIO

__all__ = [
    "BadArguments",
    "HelpFormatter",
    "Parser",
    "RawHelpFormatter",
    "Verbs",
    "add_base",
    "add_bitmap_order",
    "add_channels",
    "add_clock",
    "add_direct_io",
    "add_general",
    "add_offset",
    "add_page_size",
    "add_seal",
    "add_verb",
    "read_channels",
]

_SEAL = "--seal"
_COLUMNS = 80  # of an output that is not a terminal
# Compiled when first used: a restore waits for each import.
_ONE_DASH = r"-[A-Za-z]"
_QEMU = r"(^|/)qemu-[^/]*$"

Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


class BadArguments(UsageError):
    """An invalid command line. ``usage`` is argparse's usage text."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


def _terminal_width() -> int:
    """Return the columns of the terminal, as shutil.get_terminal_size does."""
    with contextlib.suppress(ValueError):
        if columns := int(os.environ.get("COLUMNS", "0")):
            return columns
    try:
        return os.get_terminal_size(1).columns or _COLUMNS
    except OSError:
        return _COLUMNS


class HelpFormatter(argparse.HelpFormatter):
    """argparse's, which would import shutil for each parser: it makes one for each argument."""

    def __init__(self, prog: str, **settings: Any) -> None:
        settings.setdefault("width", _terminal_width() - 2)
        super().__init__(prog, **settings)


class RawHelpFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The same for a description with line breaks of its own."""


class Parser(argparse.ArgumentParser):
    """A parser that raises BadArguments where argparse would print and exit.

    Each verb is a module, and only the module of the given verb is imported.
    """

    takes_command_line = False  # a VM's command line after -- becomes the attribute ``command``
    command_line_option: str | None = None  # the option that gives -- this meaning; None: always
    _offered: tuple[str, Sequence[str]] | None = None

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", HelpFormatter)
        super().__init__(**settings)

    def offer(self, package: str, names: Sequence[str]) -> None:
        """Accept the verbs ``names``: modules of ``package``, with ``_`` for ``-``, that have a function
        ``add_parser``."""
        self._offered = package, names

    def load_verbs(self, words: Sequence[str], *, nested: bool = False) -> None:
        """Import the offered verb that ``words`` begin with, or every verb if they name none.

        With ``nested`` the verbs of these verbs too, which are otherwise imported when they parse.
        """
        if self._offered is None:
            return
        (package, names), self._offered = self._offered, None
        # Without ``prog``, argparse formats a usage line for it, and imports shutil for that.
        verbs = self.add_subparsers(prog=self.prog, title="verbs", metavar="VERB", required=True)
        # The options before a verb have no values.
        place = next((n for n, word in enumerate(words) if not word.startswith("-")), len(words))
        named = words[place : place + 1]
        for name in named if named and named[0] in names else names:
            module = name.replace("-", "_")
            importlib.import_module(f"{package}.{module}").add_parser(verbs)
            if nested:
                verbs.choices[name].load_verbs(words[place + 1 :], nested=True)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse like argparse, except that ``--seal`` takes only an algorithm as its value."""
        given = list(sys.argv[1:] if args is None else args)
        self.load_verbs(given)
        if _SEAL in self._option_string_actions:
            given = _with_seal_joined(given)
        end = given.index("--") if "--" in given else len(given)
        option = self.command_line_option
        if not self.takes_command_line or (option and option not in given[:end]):
            return super().parse_known_args(given, namespace)
        if word := next((word for word in given[:end] if self._looks_like_ours(word)), None):
            self._refuse_without_dashes(given[:end], word)
        parsed, unknown = super().parse_known_args(given[:end], namespace)
        words = [*getattr(parsed, "command", []), *unknown]
        if words and not words[0].startswith("--"):
            self._refuse_without_dashes(words, words[0])
        parsed.command = given[end + 1 :]
        return parsed, unknown

    def _looks_like_ours(self, word: str) -> bool:
        """Return whether ``word`` is an option of QEMU whose first letter is a short option here:
        ``-vnc``, but not ``-vq``."""
        if not re.match(_ONE_DASH, word):
            return False
        ours = {name[1] for name in self._option_string_actions if len(name) == 2}
        return word[1] in ours and not ours.issuperset(word[1:])

    def _refuse_without_dashes(self, words: Sequence[str], word: str) -> NoReturn:
        program = next((text for text in words if re.search(_QEMU, text)), None)
        if program is None and word.startswith("-"):
            self.error(
                f"{word} looks like an option of QEMU: the command line of the VM comes after --, "
                f"with its program: SNAPSHOT -- qemu-system-x86_64 {word} ..."
            )
        first = program or word
        self.error(f"-- must come before {first}: SNAPSHOT -- {first} ...")

    def error(self, message: str) -> NoReturn:
        raise BadArguments(message, self.format_usage())


def _with_seal_joined(given: list[str]) -> list[str]:
    """Return the arguments with ``--seal [ALGORITHM]`` as one word.

    Only the name of an algorithm belongs to the option; any other word is an argument of its own.
    """
    algorithms = [str(algorithm) for algorithm in Algorithm]
    joined: list[str] = []
    words = iter(enumerate(given))
    for n, word in words:
        if word == "--":
            return joined + given[n:]
        if word == _SEAL:
            named = given[n + 1 : n + 2]
            if named and named[0] in algorithms:
                next(words)
                word = f"{_SEAL}={named[0]}"
            else:
                word = f"{_SEAL}={Algorithm.XXH3_128}"
        joined.append(word)
    return joined


def add_general(parser: argparse.ArgumentParser) -> None:
    """Add the options that every verb takes, before or after its name."""
    general = parser.add_argument_group("general options", "before or after the verb")
    # Without a default, which would replace an option given before the verb.
    general.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print one JSON object and nothing else",
    )
    general.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,
        help="log to standard error",
    )
    general.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print only errors, and JSON with --json",
    )
    general.add_argument(
        "--no-progress",
        action="store_true",
        default=argparse.SUPPRESS,
        help="do not show progress on a terminal",
    )


def add_verb(verbs: Verbs, name: str, run: Any, document: str | None) -> Parser:
    """Add a parser for one verb, with its module's docstring as the help. ``run`` gets the
    arguments."""
    text = (document or "").strip().replace("``", "")
    summary = text.split("\n\n")[0].replace("\n", " ")
    parser = verbs.add_parser(
        name,
        help=summary[:1].lower() + summary[1:].rstrip("."),
        description=text,
        formatter_class=RawHelpFormatter,
        allow_abbrev=False,
    )
    add_general(parser)
    parser.set_defaults(run=run)
    return parser


def add_offset(parser: Parser) -> None:
    parser.add_argument(
        "--offset",
        type=read_size,
        metavar="SIZE",
        default=None,
        help="offset of the snapshot in the file (default: 0)",
    )


def add_bitmap_order(parser: Parser) -> None:
    parser.add_argument(
        "--bitmap-order",
        choices=["little", "big"],
        default=None,
        help="byte order of the host that wrote a mapped-ram file (default: little, or big if the "
        "file of an s390 guest requires it)",
    )


def add_page_size(parser: Parser) -> None:
    parser.add_argument(
        "--page-size",
        type=read_size,
        metavar="SIZE",
        default=None,
        help="of a sequential stream that does not state it (default: 4096)",
    )


def add_base(parser: Parser) -> None:
    parser.add_argument(
        "--base",
        metavar="PATH",
        default=None,
        help="the base of an increment (default: the path that the increment records)",
    )


def add_channels(parser: Parser, default: int = 2) -> None:
    work = "move pages" if default == 2 else "read"
    parser.add_argument(
        "--channels",
        type=read_channels,
        metavar="N",
        default=default,
        help=f"threads that {work}, 1 to {MAX_CHANNELS} (default: {default})",
    )


def add_seal(parser: Parser) -> None:
    """Add ``--seal [ALGORITHM]``, in any position; see :class:`Parser`."""
    parser.add_argument(
        _SEAL,
        metavar="ALGORITHM",
        choices=[str(name) for name in Algorithm],
        default=None,
        nargs="?",
        help=f"write a seal beside the snapshot: {Algorithm.XXH3_128} (the default), "
        f"{Algorithm.BLAKE3} or {Algorithm.SHA256}",
    )


def add_clock(parser: Parser) -> None:
    """Add ``--set-time`` and ``--guest-agent``."""
    parser.add_argument(
        "--set-time",
        action="store_true",
        help="set the guest's clock through its agent when it runs again",
    )
    parser.add_argument(
        "--guest-agent",
        metavar="SOCKET",
        help="the agent's socket (default: the one in QEMU's command line)",
    )


def add_direct_io(parser: Parser) -> None:
    parser.add_argument(
        "--direct-io",
        choices=[str(setting) for setting in DirectIO],
        default="auto",
        help="whether to bypass the page cache (default: auto, if it works)",
    )


def read_channels(text: str) -> int:
    """Return a number of channels, for argparse."""
    try:
        return check_channels(int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number from 1 to {MAX_CHANNELS}"
        ) from None
