"""Show a picture of a snapshot's memory: what is zero, data, changed, touched.

Each cell of the picture is some memory. Data has a colour by its entropy: dark is structured, bright is
compressed, encrypted or random. Pages that are not stored, stored zeros, and pages of one word again and
again have colours of their own. With OTHER, and for an increment, the pages that changed stand out; so do
those of SNAPSHOT.workingset, if it is there.

Without an option the picture is text that fits the terminal, in the colours that it has (NO_COLOR, TERM,
COLORTERM; none in a pipe). ``--png``, ``--svg`` and ``--html`` write a file instead. The HTML page needs no
other file: zoom from the whole guest to a page, and look at its bytes. It contains the bytes of the first
4 MiB of data, or of ``--bytes RANGE``, 64 MiB at most.

Memory is in the order of guest-physical addresses, as an ELF core has it, then come blocks whose address is
not known; ``--by block`` shows each block by itself. A RANGE is FROM-TO or FROM+LENGTH, in guest-physical
addresses, or BLOCK, BLOCK:FROM-TO or BLOCK:FROM+LENGTH for a part of a block.

JSON: ``snapshot``; ``against`` (what was compared with, or null); ``machine``; ``by`` (address or block);
``length`` (bytes shown); ``cell_size`` (bytes); ``counts``: ``data_pages``, ``filled_pages`` (one word again
and again), ``stored_zero_pages``, ``hole_pages`` (zeros that are not stored), ``changed_pages``,
``touched_pages``; ``levels`` (data pages by entropy, half a bit a byte each, from 0 on); ``working_set``
(whether it is known); ``areas``, a list of ``block`` (null: guest-physical addresses), ``start``, ``end``,
``parts`` (a list of ``block``, ``offset``, ``length``, ``start``) and ``cells`` (a list of ``mapped``, false
without memory; ``data_share``, ``filled_share``, ``zero_share``, ``changed_share``, ``touched_share``, of the
pages; ``entropy`` of the data, in bits a byte); ``bytes_read``; ``seconds``; ``notes`` (sentences); with a
file ``picture``, its path, and no ``areas``.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from pyqmigrate.analysis.areas import By, Extent
from pyqmigrate.analysis.block_comparison import opened
from pyqmigrate.analysis.picture.colours import ThemeName
from pyqmigrate.analysis.picture.file import PictureForm, check_place, write_picture
from pyqmigrate.analysis.picture.terminal import (
    Colours,
    colours_of,
    draw,
    grid,
    terminal_width,
    theme_of,
)
from pyqmigrate.analysis.random_access import random_access
from pyqmigrate.analysis.scan import CELLS_MAX, memory_map
from pyqmigrate.cli.arguments import Verbs, add_base, add_channels, add_page_size, add_verb
from pyqmigrate.cli.outcome import Outcome, printable
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import read_range, show_size
from pyqmigrate.errors import UsageError

if TYPE_CHECKING:
    from pyqmigrate.analysis.map_report import MemoryMap
    from pyqmigrate.snapshot.base import Snapshot

__all__ = ["add_parser", "read_extent"]

_IMAGE_CELLS = 1 << 16
_ADDRESS_END = 1 << 64


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "map", _run, __doc__)
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="a snapshot of any kind")
    parser.add_argument(
        "other", metavar="OTHER", nargs="?", default=None, help="a snapshot to compare it with"
    )
    parser.add_argument(
        "--by",
        choices=[str(order) for order in By],
        default=None,
        help="the order (default: address, if addresses are known)",
    )
    parser.add_argument(
        "--range", type=read_extent, metavar="RANGE", default=None, help="show only this part"
    )
    picture = parser.add_mutually_exclusive_group()
    for form, kind in (
        ("png", "an image (needs Pillow)"),
        ("svg", "a drawing"),
        ("html", "a page to zoom in"),
    ):
        picture.add_argument(f"--{form}", metavar="FILE", default=None, help=f"write {kind}")
    parser.add_argument(
        "--bytes",
        type=read_extent,
        metavar="RANGE",
        default=None,
        help="whose bytes the HTML page contains (default: the first 4 MiB of data)",
    )
    parser.add_argument(
        "--colours",
        choices=[str(colours) for colours in Colours],
        default=None,
        help="of the terminal (default: as it has them)",
    )
    parser.add_argument(
        "--theme",
        choices=[str(theme) for theme in ThemeName],
        default=None,
        help="of the terminal (default: dark, or as COLORFGBG says) or the image (default: light)",
    )
    parser.add_argument(
        "--cells",
        type=_read_cells,
        metavar="N",
        default=None,
        help="how many cells at most (default: as the picture has room)",
    )
    parser.add_argument(
        "--no-seals", action="store_true", help="compare everything, also where seals are equal"
    )
    parser.add_argument(
        "--no-working-set", action="store_true", help="do not show SNAPSHOT.workingset"
    )
    add_page_size(parser)
    add_base(parser)
    add_channels(parser)


def read_extent(text: str) -> Extent:
    """Return a range, for argparse: FROM-TO, FROM+LENGTH, or BLOCK with one of these after a colon.

    A name with a colon is possible: only the last one can be before numbers.
    """
    name, colon, numbers = text.rpartition(":")
    if not colon and read_range(text) is None:
        return Extent(0, _ADDRESS_END, text)
    found = read_range(numbers)
    if found is None:
        return Extent(0, _ADDRESS_END, text)
    return Extent(*found, name if colon else None)


def _read_cells(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) <= CELLS_MAX):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {CELLS_MAX}")
    return int(text)


def _run(args: argparse.Namespace) -> Outcome:
    name = args.png or args.svg or args.html
    if args.bytes is not None and args.html is None:
        raise UsageError("--bytes is for the page of --html")
    if name is not None:
        return _write(args, name)
    colours = Colours(args.colours) if args.colours else colours_of(os.environ, _on_terminal())
    width = terminal_width()
    found = _scan(args, args.snapshot, args.cells or grid(width)[1])
    theme = ThemeName(args.theme) if args.theme else theme_of(os.environ)
    lines = [*draw(found, width, colours, theme, _encoding()), *_notes(found)]
    return Outcome(found.to_json(), lines)


def _on_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _encoding() -> str:
    return (sys.stdout and sys.stdout.encoding) or "ascii"


def _notes(found: MemoryMap) -> list[str]:
    return [f"note  {printable(note)}" for note in found.notes]


def _scan(args: argparse.Namespace, snapshot: Snapshot | str, cells: int) -> MemoryMap:
    with shown("scan") as show:
        return memory_map(
            snapshot,
            args.other,
            by=args.by,
            extent=args.range,
            cells=cells,
            seals=not args.no_seals,
            working_set=not args.no_working_set,
            channels=args.channels,
            page_size=args.page_size,
            base=args.base,
            progress=show,
        )


def _write(args: argparse.Namespace, name: str) -> Outcome:
    """Write a file, which is checked before anything is read, and which never is one of those read."""
    form = PictureForm.PNG if args.png else PictureForm.SVG if args.svg else PictureForm.HTML
    place = check_place(name, form)
    theme = ThemeName(args.theme) if args.theme else ThemeName.LIGHT
    with (
        opened(args.snapshot, args.page_size, args.base) as given,
        shown("scan") as show,
        random_access(given, show) as snapshot,
    ):
        given.refuse_as_target(place)
        default = CELLS_MAX if form is PictureForm.HTML else _IMAGE_CELLS
        found = replace(_scan(args, snapshot, args.cells or default), snapshot=given.source.name)
        write_picture(place, form, found, snapshot, theme=theme, extent=args.bytes)
    data = found.to_json(areas=False)
    lines = [f"{name}: {show_size(place.stat().st_size)}, {found.seconds:.2f} s", *_notes(found)]
    return Outcome(data | {"picture": name}, lines)
