"""Find a text, bytes or a regular expression in a guest's memory.

SNAPSHOT is of any kind. The results come in the order of guest-physical
addresses, those in memory without a known address last. Memory without data is not read, and counts as
zeros. Of matches that overlap only the first is given. PATTERN is a text in UTF-8; ``--hex`` bytes such as
"de ad be ef", ``--utf-16`` a text in UTF-16LE (Windows), ``--regex`` a regular expression over bytes in the
syntax of Python's re. A match of an expression is found whole up to 64 KiB. The exit code is 0 whether or
not anything was found.

JSON: an object in one line for each match, with the key ``match``: ``block``, ``offset`` (bytes, in the
block), ``address`` (guest-physical, or null), ``hex``, ``before`` and ``after`` (the bytes, as hex digits).
The last line is an object of ``matches`` (their number), ``engine`` (bytes, re or re2), ``bytes_read``, ``seconds`` and
``notes`` (sentences). With --count there is only this.
"""

from __future__ import annotations

import argparse
import os

from pyqmigrate.analysis.search import Match, Search, find
from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.lines_output import LinesOutput
from pyqmigrate.cli.opening import add_snapshot, opened_at_random
from pyqmigrate.cli.outcome import Outcome, printable
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.search_options import add_area, shown_place
from pyqmigrate.cli.sizes import read_size, show_size
from pyqmigrate.errors import UsageError

__all__ = ["add_parser"]

_SHOWN = 160  # bytes of one match
_PRINTABLE = bytes(byte if 0x20 <= byte < 0x7F else ord(".") for byte in range(256))


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "find", _run, __doc__)
    add_snapshot(parser)
    parser.add_argument("pattern", metavar="PATTERN", help="what to find")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--hex", action="store_true", help="PATTERN is bytes in hex digits")
    form.add_argument("--regex", action="store_true", help="PATTERN is a regular expression")
    form.add_argument("--utf-16", action="store_true", help="PATTERN is a text in UTF-16LE")
    add_area(parser)
    parser.add_argument("--count", action="store_true", help="print only the number of matches")
    parser.add_argument(
        "--context",
        type=read_size,
        metavar="N",
        default=0,
        help="show N bytes before and after each match, at most 64 KiB",
    )
    parser.set_defaults(json_lines=True)


def _run(args: argparse.Namespace) -> Outcome:
    pattern = _pattern(args)
    output = LinesOutput(args)
    with (
        opened_at_random(args) as snapshot,
        shown("find") as show,
        find(
            snapshot,
            pattern,
            regex=args.regex,
            block=args.block,
            addresses=args.address_range,
            context=args.context,
            channels=args.channels,
            progress=show,
        ) as search,
    ):
        matches = search.count() if args.count else _print(search, output)
        _finish(search, matches, args, output)
    output.flush()
    return Outcome(None, [])


def _pattern(args: argparse.Namespace) -> bytes:
    if args.hex:
        try:
            return bytes.fromhex(args.pattern)
        except ValueError:
            raise UsageError(
                f"{args.pattern!r} is not bytes in hex digits, such as 'de ad be ef'"
            ) from None
    if args.utf_16:
        return str(args.pattern).encode("utf-16-le", "surrogatepass")
    return os.fsencode(args.pattern)


def _print(search: Search, output: LinesOutput) -> int:
    matches = 0
    for match in search:
        matches += 1
        output.put({"match": _data(match)}, _line(match))
        if output.closed:
            break
    return matches


def _data(match: Match) -> dict[str, object]:
    return {
        "block": match.block,
        "offset": match.offset,
        "address": match.address,
        "hex": match.data.hex(),
        "before": match.before.hex(),
        "after": match.after.hex(),
    }


def _line(match: Match) -> str:
    place = shown_place(printable(match.block), match.offset, match.address)
    around = match.before + match.data[:_SHOWN] + match.after
    return f"{place}  {around.translate(_PRINTABLE).decode()}"


def _finish(search: Search, matches: int, args: argparse.Namespace, output: LinesOutput) -> None:
    read = f"{show_size(search.bytes_read)} read in {search.seconds:.2f} s"
    summary = str(matches) if args.count else f"{matches} found: {read}"
    if not args.json and not args.count:
        for note in search.notes:
            output.put({}, f"note: {printable(note)}")
    output.put(
        {
            "matches": matches,
            "engine": search.engine,
            "bytes_read": search.bytes_read,
            "seconds": search.seconds,
            "notes": list(search.notes),
        },
        summary,
    )
