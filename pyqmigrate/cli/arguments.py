"""What the verbs' arguments have in common."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

from pyqmigrate.cli.sizes import read_size
from pyqmigrate.errors import UsageError
from pyqmigrate.io.channels import MAX_CHANNELS, check_channels
from pyqmigrate.io.target import DirectIO

__all__ = [
    "BadArguments",
    "Parser",
    "Verbs",
    "add_channels",
    "add_direct_io",
    "add_offset",
    "add_verb",
    "read_channels",
]

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
        if self._offered:
            (package, names), self._offered = self._offered, None
            verbs = self.add_subparsers(title="verbs", metavar="VERB", required=True)
            for name in [name for name in names if name in (args or ())[:1]] or names:
                importlib.import_module(f"{package}.{name}").add_parser(verbs)
        return super().parse_known_args(args, namespace)

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


def add_channels(parser: Parser) -> None:
    parser.add_argument(
        "--channels", type=read_channels, metavar="N", default=2,
        help=f"threads that move pages, 1 to {MAX_CHANNELS} (default: 2)",
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
