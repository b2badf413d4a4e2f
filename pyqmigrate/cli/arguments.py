"""What the verbs' arguments have in common."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

from pyqmigrate.cli.sizes import read_size
from pyqmigrate.errors import UsageError
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.io.channels import MAX_CHANNELS, check_channels
from pyqmigrate.io.target import DirectIO

__all__ = [
    "BadArguments",
    "Parser",
    "Verbs",
    "add_bitmap_order",
    "add_channels",
    "add_clock",
    "add_direct_io",
    "add_offset",
    "add_seal",
    "add_verb",
    "read_channels",
]

_SEAL = "--seal"

Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


class BadArguments(UsageError):
    """The command line does not parse. ``usage`` is the line that shows how."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


class Parser(argparse.ArgumentParser):
    """Raises BadArguments where argparse would print and exit.

    Verbs that are offered are modules; only that of the verb which is asked for is imported.
    """

    _offered: tuple[str, Sequence[str]] | None = None

    def offer(self, package: str, names: Sequence[str]) -> None:
        """Take one of the verbs ``names``, modules of ``package`` with an ``add_parser``."""
        self._offered = package, names

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As argparse's; an option whose value may be left out would take the next argument."""
        given = list(sys.argv[1:] if args is None else args)
        if self._offered:
            (package, names), self._offered = self._offered, None
            verbs = self.add_subparsers(title="verbs", metavar="VERB", required=True)
            for name in [name for name in names if name in given[:1]] or names:
                importlib.import_module(f"{package}.{name}").add_parser(verbs)
        end = given.index("--") if "--" in given else len(given)
        if _SEAL in self._option_string_actions:
            given[:end] = [
                f"{_SEAL}={Algorithm.XXH3_128}" if text == _SEAL else text for text in given[:end]
            ]
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        raise BadArguments(message, self.format_usage())


def add_verb(verbs: Verbs, name: str, run: Any, document: str | None) -> Parser:
    """A parser for one verb. Its module's docstring is the help; ``run`` gets the arguments."""
    text = (document or "").strip().replace("``", "")
    summary = text.split("\n\n")[0].replace("\n", " ")
    parser = verbs.add_parser(
        name, help=summary[:1].lower() + summary[1:].rstrip("."), description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    parser.set_defaults(run=run)
    return parser


def add_offset(parser: Parser) -> None:
    parser.add_argument(
        "--offset", type=read_size, metavar="SIZE", default=None,
        help="where in the file the snapshot starts (default: 0)",
    )


def add_bitmap_order(parser: Parser) -> None:
    parser.add_argument(
        "--bitmap-order", choices=["little", "big"], default=None,
        help="byte order of the host that wrote a mapped-ram file (default: little; big for an "
        "s390 guest whose file shows it)",
    )


def add_channels(parser: Parser, default: int = 2) -> None:
    what = "move pages" if default == 2 else "read"
    parser.add_argument(
        "--channels", type=read_channels, metavar="N", default=default,
        help=f"threads that {what}, 1 to {MAX_CHANNELS} (default: {default})",
    )


def add_seal(parser: Parser) -> None:
    """``--seal[=ALGORITHM]``; what follows ``--seal`` without the sign is another argument."""
    parser.add_argument(
        _SEAL, metavar="ALGORITHM", choices=[str(name) for name in Algorithm], default=None,
        help=f"write a seal beside the snapshot; --seal alone is --seal={Algorithm.XXH3_128} "
        f"(others: {Algorithm.BLAKE3}, {Algorithm.SHA256})",
    )


def add_clock(parser: Parser) -> None:
    """``--set-time`` and ``--guest-agent``."""
    parser.add_argument(
        "--set-time", action="store_true", help="set the guest's clock by its agent when it goes on"
    )
    parser.add_argument(
        "--guest-agent", metavar="SOCKET",
        help="the agent's socket (default: found in QEMU's command line)",
    )


def add_direct_io(parser: Parser) -> None:
    parser.add_argument(
        "--direct-io", choices=[str(setting) for setting in DirectIO], default="auto",
        help="whether pages go past the page cache (default: auto, where it works)",
    )


def read_channels(text: str) -> int:
    """For argparse: a number of channels."""
    try:
        return check_channels(int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number from 1 to {MAX_CHANNELS}"
        ) from None
