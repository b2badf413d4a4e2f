"""The arguments that the verbs of ``fleet`` have in common."""

from __future__ import annotations

import argparse

from pyqmigrate.cli.arguments import Parser

__all__ = ["add_fleet"]


def add_fleet(parser: Parser, *, jobs: str) -> None:
    """Add TARGET and the options of a run; ``jobs`` describes the default of ``--jobs``."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="+",
        help="a file, a pattern, a directory, STORE, STORE#PATTERN, or s3://BUCKET/PREFIX/",
    )
    parser.add_argument(
        "--jobs",
        type=_read_jobs,
        metavar="N",
        default=None,
        help=f"threads of this machine (default: {jobs})",
    )
    parser.add_argument(
        "--scheduler",
        metavar="tcp://HOST:PORT",
        default=None,
        help="a Dask scheduler, whose workers do the work instead",
    )
    parser.add_argument(
        "--table",
        metavar="FILE",
        default=None,
        help="keep the results there, and do only what is missing or changed; fleet table prints it",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="do everything again, also what the table has (bits can rot)",
    )


def _read_jobs(text: str) -> int:
    try:
        jobs = int(text)
    except ValueError:
        jobs = 0
    if not 1 <= jobs <= 255:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 255")
    return jobs
