"""Verify that a snapshot is whole and well-formed, and what was sealed.

With a seal beside it (SNAPSHOT.seal, see the verb seal) every byte of the file is held against it:
a damage is told with its MiB and file offset, the block, and the pages of the guest (in a sequential
stream by its records, if they still parse). Then, as
always, the structure is checked: every length and offset against each other and the file's size,
every bitmap or page record, and that the end of the stream is there. Without a seal flipped bits in
pages cannot be seen.

Whether the bitmaps would fit the file better in the other byte order is noted (see --bitmap-order).

``--deep`` decodes the device state too, and counts pages whose bit is clear and that do not read as
zeros in the file. These are no damage: for the guest they are zeros.

JSON: ``snapshot``; ``valid``; ``seal``, null where there is none, otherwise an object of ``path``,
``algorithm``, ``sealed_size``, ``intact``, ``damages``, ``notes`` (sentences), ``bytes_read``,
``seconds``, ``direct_io``, ``direct_io_reason``. Each of ``damages`` has ``mib``, ``offset``,
``length`` (bytes), ``why``, and ``parts``: what was sealed there, ``what`` (pages, bitmap, or
words), ``block``, ``first_page``, ``end_page`` (not included), ``data_pages``. Where it is intact
or null: ``bitmap_order`` (null for a sequential stream), ``notes`` (sentences), ``block_count``,
``data_pages``, ``zero_pages`` (numbers); with --deep ``device_count`` (null where they cannot be
told apart), ``stale_pages`` and ``stale_blocks`` (their number by block). Damage exits with 1; a
snapshot or a seal that cannot be parsed is an error, with exit code 1.
"""

from __future__ import annotations

import argparse
from typing import Any

from pyqmigrate.cli.arguments import Verbs, add_channels, add_direct_io, add_verb
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.opening import add_snapshot, opened
from pyqmigrate.cli.outcome import Outcome, counted, printable, shown_seal
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import show_rate, show_size
from pyqmigrate.cli.standard_streams import read_from
from pyqmigrate.errors import NotSupported
from pyqmigrate.integrity.seal import SealCheck, stale_pages, verify_seal
from pyqmigrate.io.bitmap_order import better_order, says_better
from pyqmigrate.io.pipe import PipeReader
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.devices import devices
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "verify", _run, __doc__)
    add_snapshot(parser)
    parser.add_argument(
        "--deep", action="store_true", help="look at device state and clear pages too"
    )
    add_channels(parser, default=4)
    add_direct_io(parser)


def _run(args: argparse.Namespace) -> Outcome:
    check = None if _is_pipe(args.snapshot) else _check_seal(args)
    data: dict[str, Any] = {
        "snapshot": args.snapshot,
        "valid": True,
        "seal": None if check is None else check.to_json(),
    }
    lines = [] if check is None else _about(args.snapshot, check)
    if check is not None and not check.intact:
        return Outcome(data | {"valid": False}, lines, ExitCode.BAD)
    with opened(args, args.snapshot) as snapshot:
        snapshot.verify()
        blocks = [block for block in snapshot.blocks.values() if not block.external]
        pages = sum(block.data_pages for block in blocks)
        zero = sum(block.zero_pages for block in blocks)
        count = len(snapshot.blocks)
        data |= {"bitmap_order": None, "notes": []}
        if isinstance(snapshot, MappedRamSnapshot):
            order = snapshot.bitmap_order
            better = better_order(snapshot.source, snapshot.stream.blocks, order)
            notes = [] if better is None else [says_better(better)]
            data |= {"bitmap_order": order, "notes": notes}
            lines += [f"note      {note}" for note in notes]
        data |= {"block_count": count, "data_pages": pages, "zero_pages": zero}
        lines.append(
            f"{printable(args.snapshot)}: well-formed and whole: {counted(count, 'block')}, "
            f"{counted(pages, 'data page')}, {counted(zero, 'zero page')}"
        )
        if args.deep:
            _look_deeper(args, snapshot, data, lines)
    return Outcome(data, lines)


def _is_pipe(path: str) -> bool:
    """Whether there is no file that a seal could be beside."""
    return PipeReader.is_pipe(read_from(path, None)[0])


def _check_seal(args: argparse.Namespace) -> SealCheck | None:
    path, _ = read_from(args.snapshot, None)
    with shown("verify") as show:
        return verify_seal(
            path,
            page_size=args.page_size,
            channels=args.channels,
            direct_io=args.direct_io,
            progress=show,
        )


def _about(snapshot: str, check: SealCheck) -> list[str]:
    lines = [printable(f"damaged   {damage}") for damage in check.damages]
    lines += [f"note      {printable(note)}" for note in check.notes]
    rate = show_rate(check.bytes_read, check.seconds)
    verdict = "nothing has changed" if check.intact else "NOT what was sealed"
    return [
        *lines,
        f"{printable(shown_seal(snapshot, check.seal))}: {verdict}: {check.algorithm} of "
        f"{show_size(check.size)}, {show_size(check.bytes_read)} read in {check.seconds:.2f} s, "
        f"{rate} MiB/s",
    ]


def _look_deeper(
    args: argparse.Namespace, snapshot: Snapshot, data: dict[str, Any], lines: list[str]
) -> None:
    stale = (
        stale_pages(snapshot, channels=args.channels)
        if isinstance(snapshot, MappedRamSnapshot)
        else {}
    )
    data |= {"stale_pages": sum(stale.values()), "stale_blocks": stale}
    lines += [
        f"{counted(number, 'clear page')} of block {printable(name)!r} with old bytes in the file"
        for name, number in stale.items()
    ]
    try:
        found = devices(snapshot)
    except NotSupported as error:
        data["device_count"] = None
        lines.append(f"device state: {printable(str(error))}")
        return
    number = len(found.devices)
    data["device_count"] = None if found.opaque_tail else number
    lines.append(
        "device state cannot be told apart: there is no description, or it does not fit"
        if found.opaque_tail
        else f"device state: {counted(number, 'section')} decoded"
    )
