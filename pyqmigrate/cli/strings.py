"""Print the strings in a guest's memory, with their addresses.

A string is a run of at least N printable characters (ASCII and tab), as of strings(1); with ``--utf-16``
each is two bytes, little-endian, and may start at any byte. SNAPSHOT is of any kind that can be read at
random. The strings come in the order of guest-physical addresses, those in memory without a known address
last. Memory without data is not read. A string of more than 1 MiB comes in parts.

JSON: an object in one line for each string, with the key ``string``: ``block``, ``offset`` (bytes, in the
block), ``address`` (guest-physical, or null), ``text`` and ``length`` (bytes in memory). The last line is an
object of ``strings`` (their number), ``bytes_read``, ``seconds`` and ``notes`` (sentences).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pyqmigrate.analysis.text_search import strings
from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.lines_output import LinesOutput
from pyqmigrate.cli.opening import add_snapshot, opened_at_random
from pyqmigrate.cli.outcome import Outcome, printable
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.search_options import add_area, shown_place

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "strings", _run, __doc__)
    add_snapshot(parser)
    parser.add_argument(
        "-n",
        "--least",
        type=int,
        metavar="N",
        default=4,
        help="characters that a string has at least (default: 4)",
    )
    parser.add_argument("--utf-16", action="store_true", help="find text in UTF-16LE (Windows)")
    add_area(parser)
    parser.set_defaults(json_lines=True)


def _run(args: argparse.Namespace) -> Outcome:
    output = LinesOutput(args)
    with (
        opened_at_random(args) as snapshot,
        shown("strings") as show,
        strings(
            snapshot,
            args.least,
            utf_16=args.utf_16,
            block=args.block,
            addresses=args.address_range,
            channels=args.channels,
            progress=show,
        ) as search,
    ):
        found = 0
        for text in search:
            found += 1
            place = shown_place(printable(text.block), text.offset, text.address)
            output.put({"string": asdict(text)}, f"{place}  {text.text}")
            if output.closed:
                break
        if args.json:
            output.put(
                {
                    "strings": found,
                    "bytes_read": search.bytes_read,
                    "seconds": search.seconds,
                    "notes": list(search.notes),
                },
                "",
            )
    output.flush()
    return Outcome(None, [])
