"""Convert a snapshot into another form.

SRC is a snapshot of any kind; DST becomes, as ``--to`` says:

``mapped-ram``  a mapped-ram file: fast to restore, in parallel or at once
``stream``      a classic stream, as every QEMU loads it
``raw``         a directory of raw files, one a RAM block (as unpack)

Device state is carried over byte for byte. DST appears only when it is whole and durable.
``--memory NAME=FILE`` gives the content of a block that SRC only lists (x-ignore-shared).

JSON: ``snapshot``; ``target``; ``to``; for raw what unpack has, otherwise what pack has.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeAlias

from pyqmigrate.cli.arguments import Verbs, add_channels, add_direct_io, add_verb
from pyqmigrate.cli.opening import add_snapshot, opened
from pyqmigrate.cli.outcome import Outcome, printable
from pyqmigrate.cli.progress import Show, shown
from pyqmigrate.cli.sizes import show_rate, show_size
from pyqmigrate.export.convert import Form, convert
from pyqmigrate.io.memory import FileMemory
from pyqmigrate.opening import AnySnapshot
from pyqmigrate.save import SaveReport, Sparse

__all__ = ["FORMS", "add_parser"]

Converter: TypeAlias = Callable[[argparse.Namespace, AnySnapshot, Show | None], Outcome]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "convert", _run, __doc__)
    add_snapshot(parser)
    parser.add_argument("target", metavar="DST")
    parser.add_argument("--to", choices=[*FORMS], required=True, help="the form of DST")
    parser.add_argument(
        "--memory", metavar="NAME=FILE", action="append", default=[], type=_read_memory,
        help="the content of a block; may be repeated",
    )
    add_channels(parser)
    add_direct_io(parser)
    parser.add_argument(
        "--sparse", choices=[str(policy) for policy in Sparse], default="auto",
        help="what becomes of zero pages in a mapped-ram file (default: auto)",
    )


def _read_memory(text: str) -> tuple[str, str]:
    name, equals, path = text.rpartition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, path


def _run(args: argparse.Namespace) -> Outcome:
    with opened(args, args.snapshot) as snapshot, shown("convert") as show:
        return FORMS[args.to](args, snapshot, show)


def _convert(args: argparse.Namespace, snapshot: AnySnapshot, show: Show | None) -> Outcome:
    with contextlib.ExitStack() as stack:
        memories = {}
        for name, path in args.memory:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, fd)
            memories[name] = FileMemory(fd)
        report = convert(
            snapshot, args.target, to=args.to, channels=args.channels, direct_io=args.direct_io,
            sparse=args.sparse, memories=memories, progress=show,
        )
    data = {
        "snapshot": args.snapshot, "target": args.target, "to": args.to, **asdict(report),
    }
    front = f"{printable(args.target)}: {args.to}, {show_size(report.bytes_allocated)} allocated"
    if isinstance(report, SaveReport):
        rate = show_rate(report.bytes_written, report.seconds)
        return Outcome(data, [
            f"{front}, {report.data_pages} data pages, {report.zero_pages} zero pages",
            f"{show_size(report.bytes_written)} written in {report.seconds:.2f} s, {rate} MiB/s",
        ])
    return Outcome(data, [f"{front}, {len(report.blocks)} blocks, {report.seconds:.2f} s"])


FORMS: dict[str, Converter] = {str(form): _convert for form in Form}
