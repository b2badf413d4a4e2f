"""Pack raw memory files into a snapshot.

Each ``NAME=FILE`` (split at the last ``=``) is a RAM block: its name, and the file with its bytes,
whole pages of 4 KiB. Holes in the files are neither read nor stored. SNAPSHOT appears only when it is
complete and durable; with ``--offset`` it is written into the file in place, and is a valid snapshot
only when it is complete. ``--seal`` then writes SNAPSHOT.seal without reading SNAPSHOT again; see the
verb seal.

JSON: ``snapshot``; ``data_pages``, ``zero_pages``; ``bytes_written``, ``bytes_allocated``,
``file_size``; ``seconds``, fsync included; ``direct_io`` (true or false), ``direct_io_reason``;
``channels``; ``sparse``; ``unaligned_blocks`` (names); ``seal`` (null, or an object of ``path`` and
``algorithm``).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
from dataclasses import asdict
from typing import NamedTuple

from pyqmigrate.api import save
from pyqmigrate.cli.arguments import (
    Verbs,
    add_channels,
    add_direct_io,
    add_offset,
    add_seal,
    add_verb,
)
from pyqmigrate.cli.outcome import Outcome, counted, printable, seal_data
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import show_rate, show_size
from pyqmigrate.cli.standard_streams import is_standard, write_to
from pyqmigrate.errors import UsageError
from pyqmigrate.io.memory import FileMemory, RamBlock
from pyqmigrate.io.place import seal_path
from pyqmigrate.io.target import Target, target_path
from pyqmigrate.snapshot.save.writer import SaveReport, Sparse

__all__ = ["add_parser"]


class _Source(NamedTuple):
    name: str
    path: str


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "pack", _run, __doc__)
    parser.add_argument(
        "snapshot",
        metavar="SNAPSHOT",
        help="the snapshot to write; - is standard output, which must be a file",
    )
    parser.set_defaults(writes="snapshot")
    parser.add_argument(
        "blocks", metavar="NAME=FILE", nargs="+", type=_read_source, help="a RAM block"
    )
    parser.add_argument(
        "--machine",
        metavar="TYPE",
        default="",
        help="machine type of the guest (default: none, which loads on any machine)",
    )
    add_channels(parser)
    add_direct_io(parser)
    parser.add_argument(
        "--sparse",
        choices=[str(policy) for policy in Sparse],
        default="auto",
        help="which zero pages are allocated (default: auto, those in short gaps)",
    )
    add_offset(parser)
    add_seal(parser)


def _read_source(text: str) -> _Source:
    name, equals, path = text.rpartition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return _Source(name, path)


def _run(args: argparse.Namespace) -> Outcome:
    with contextlib.ExitStack() as stack:
        blocks = []
        for name, path in args.blocks:
            fd = _open_memory(path)
            stack.callback(os.close, fd)
            blocks.append(RamBlock(name, FileMemory(fd)))
        show = stack.enter_context(shown("pack"))
        report = save(
            _target(args),
            blocks,
            channels=args.channels,
            direct_io=args.direct_io,
            sparse=args.sparse,
            machine=args.machine,
            seal=args.seal,
            progress=show,
        )
    data = {"snapshot": args.snapshot, **asdict(report)}
    if report.seal is not None:
        data["seal"] = seal_data(seal_path(target_path(args.snapshot)), report.seal)
    return Outcome(data, _lines(args.snapshot, report))


def _open_memory(path: str) -> int:
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return fd
    os.close(fd)
    raise UsageError(f"{path!r} is neither a file nor a block device")


def _target(args: argparse.Namespace) -> Target:
    path: str = args.snapshot
    offset: int | None = args.offset
    if is_standard(path):
        if offset is not None:
            raise UsageError("--offset cannot be combined with '-'")
        return write_to(path, forward="a mapped-ram file has its pages at fixed places")
    if offset is None:
        return path
    if path.startswith("file:") or ",offset=" in path:
        raise UsageError(
            f"--offset cannot be combined with {path!r}: give the offset in a file: URI"
        )
    return f"file:{path},offset={offset}"


def _lines(path: str, report: SaveReport) -> list[str]:
    pages = report.data_pages + report.zero_pages
    rate = show_rate(report.bytes_written, report.seconds)
    return [
        f"{printable(path)}: {show_size(report.file_size)}, "
        f"{show_size(report.bytes_allocated)} allocated",
        f"{counted(pages, 'page')}: {report.data_pages} data, {report.zero_pages} zero",
        f"{show_size(report.bytes_written)} written in {report.seconds:.2f} s, {rate} MiB/s, "
        f"{counted(report.channels, 'channel')}, direct I/O {'on' if report.direct_io else 'off'} "
        f"({report.direct_io_reason})",
        *(
            f"the memory of {printable(name)!r} is not aligned, so it was copied"
            for name in report.unaligned_blocks
        ),
        *([f"sealed: {report.seal}"] if report.seal else []),
    ]
