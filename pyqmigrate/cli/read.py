"""Show bytes of a guest's memory, by guest-physical address or by block.

WHERE is @ADDRESS, a guest-physical address as ``convert --to elf`` has it, or BLOCK:OFFSET. LENGTH is in
bytes. SNAPSHOT is of any kind. The bytes are shown in lines of 16 as hex digits
and text; ``--hex`` prints only digits, ``--raw`` the bytes as they are. It is an error if there is no memory
at one of the addresses.

JSON: ``block`` and ``offset`` (bytes, in the block) or ``address``, the others null; ``length``; ``hex``
(the bytes, as hex digits; at most 16 MiB).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.lines_output import LinesOutput
from pyqmigrate.cli.opening import add_snapshot, opened_at_random
from pyqmigrate.cli.outcome import Outcome
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import read_size
from pyqmigrate.errors import UsageError
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.load.memories import check_known

__all__ = ["add_parser"]

_PIECE = 1 << 20  # bytes read at once, a multiple of _LINE
_LINE = 16
_JSON_MAX = 16 << 20
_PRINTABLE = bytes(byte if 0x20 <= byte < 0x7F else ord(".") for byte in range(256))

Read = Callable[[int, int], bytes]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "read", _run, __doc__)
    add_snapshot(parser)
    parser.add_argument("where", metavar="WHERE", help="@ADDRESS or BLOCK:OFFSET")
    parser.add_argument("length", metavar="LENGTH", type=read_size, help="how many bytes to read")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--hex", action="store_true", help="print only hex digits")
    form.add_argument("--raw", action="store_true", help="write the bytes as they are")


def _run(args: argparse.Namespace) -> Outcome:
    block, start = _place(args.where)
    if args.json and (args.raw or args.length > _JSON_MAX):
        raise UsageError(f"--json is for at most {_JSON_MAX >> 20} MiB, without --raw")
    if args.raw and os.isatty(1):
        raise UsageError("standard output is a terminal: redirect it to a file or a pipe")
    with opened_at_random(args) as snapshot, shown("read") as show:
        snapshot.prepare_random_reads(show)
        read = _reader(snapshot, block)
        if args.json:
            data = {
                "block": block,
                "offset": None if block is None else start,
                "address": start if block is None else None,
                "length": args.length,
                "hex": read(start, args.length).hex(),
            }
            return Outcome(data, [])
        pieces = _pieces(read, start, args.length)
        if args.raw:
            _write_raw(pieces)
        else:
            _print(pieces, args)
    return Outcome(None, [])


def _place(text: str) -> tuple[str | None, int]:
    """Return the block, None for a guest-physical address, and the offset or address."""
    name, colon, offset = text.rpartition(":")
    try:
        if text.startswith("@"):
            return None, read_size(text[1:])
        if colon:
            return name, read_size(offset)
    except argparse.ArgumentTypeError as error:
        raise UsageError(str(error)) from None
    raise UsageError(f"{text!r} is not a place: write it as @0x1000000 or pc.ram:0x1000")


def _reader(snapshot: Snapshot, block: str | None) -> Read:
    if block is not None:
        check_known([block], snapshot.blocks)
        return snapshot.blocks[block].read
    from pyqmigrate.analysis.physical_memory import PhysicalMemory  # slow to import

    return PhysicalMemory(snapshot).read


def _pieces(read: Read, start: int, length: int) -> Iterator[tuple[int, bytes]]:
    for position in range(start, start + length, _PIECE):
        yield position, read(position, min(_PIECE, start + length - position))


def _write_raw(pieces: Iterator[tuple[int, bytes]]) -> None:
    sys.stdout.flush()
    for _, data in pieces:
        while data:
            try:
                data = data[os.write(1, data) :]
            except BrokenPipeError:  # its reader has enough
                return


def _print(pieces: Iterator[tuple[int, bytes]], args: argparse.Namespace) -> None:
    output = LinesOutput(args)
    for position, data in pieces:
        for start in range(0, len(data), _LINE):
            row = data[start : start + _LINE]
            if args.hex:
                line = row.hex()
            else:
                text = row.translate(_PRINTABLE).decode()
                line = f"{position + start:#014x}  {row.hex(' '):{3 * _LINE}} {text}"
            output.put({}, line)
        if output.closed:
            return
    output.flush()
