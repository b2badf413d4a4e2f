"""Verify that a snapshot is complete and well-formed, and that it is as it was sealed.

If there is a seal beside it (SNAPSHOT.seal, see the verb seal), every byte of the file is compared with
the seal. Damage is reported with its MiB and file offset, the block, and the pages of the guest; in a
sequential stream the pages are found through its records, if these still parse. Then the structure is
checked, with or without a seal: every length and offset against each other and the file's size, every
bitmap or page record, and the end of the stream. Without a seal, flipped bits in pages cannot be found.

Of an increment the base is verified too: that it is the file that the increment was made from, its
seal if it has one, and its structure.

A note says if the bitmaps would fit the file better in the other byte order (see --bitmap-order).

``--deep`` also decodes the device state, and counts pages whose bit is clear and that do not read as
zeros in the file. Such pages are not damage: for the guest they are zeros.

JSON: ``snapshot``; ``valid``; ``seal``, null without a seal, otherwise an object of ``path``,
``algorithm``, ``sealed_size``, ``intact``, ``damages``, ``notes`` (sentences), ``bytes_read``,
``seconds``, ``direct_io``, ``direct_io_reason``. Each of ``damages`` has ``mib``, ``offset``,
``length`` (bytes), ``why``, and ``parts``: what was sealed there, ``what`` (pages, bitmap, or
words), ``block``, ``first_page``, ``end_page`` (not included), ``data_pages``. If it is intact
or null: ``bitmap_order`` (null for a sequential stream), ``notes`` (sentences), ``block_count``,
``data_pages``, ``zero_pages`` (numbers); with --deep ``device_count`` (null if they cannot be
separated), ``stale_pages`` and ``stale_blocks`` (their number by block). Of an increment:
``base``, its path, and ``base_seal``, like ``seal`` (``valid`` is false if the base is not intact); the
page counts are those of both files, the clear pages of ``--deep`` those of the increment. The exit code is 1
for damage, and for a snapshot or a seal that cannot be parsed, which is an error.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from pyqmigrate.cli.arguments import Verbs, add_channels, add_direct_io, add_verb
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.opening import add_snapshot, opened
from pyqmigrate.cli.outcome import Outcome, counted, printable, shown_seal
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import show_rate, show_size
from pyqmigrate.cli.standard_streams import read_from
from pyqmigrate.enums import Format
from pyqmigrate.errors import NotSupported
from pyqmigrate.integrity.seal import stale_pages
from pyqmigrate.integrity.verify import SealCheck, verify_seal
from pyqmigrate.io.bitmap_order import better_order, says_better
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.pipe import PipeReader
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.devices import devices

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "verify", _run, __doc__)
    add_snapshot(parser)
    parser.add_argument(
        "--deep", action="store_true", help="also check device state and clear pages"
    )
    add_channels(parser, default=4)
    add_direct_io(parser)


def _run(args: argparse.Namespace) -> Outcome:
    if _is_pipe(args.snapshot):
        return _verify(args, None)
    path = read_from(args.snapshot, None)[0]
    # Held open: a snapshot of a store is then shown once for all that reads it.
    with contextlib.closing(InputFile(path)):
        return _verify(args, _check_seal(args, path))


def _verify(args: argparse.Namespace, check: SealCheck | None) -> Outcome:
    data: dict[str, Any] = {
        "snapshot": args.snapshot,
        "valid": True,
        "seal": None if check is None else check.to_json(),
    }
    lines = [] if check is None else _about(args.snapshot, check)
    if check is not None and not check.intact:
        return Outcome(data | {"valid": False}, lines, ExitCode.BAD)
    with opened(args, args.snapshot) as snapshot:
        if snapshot.format is Format.INCREMENT and not _check_base(args, snapshot, data, lines):
            return Outcome(data | {"valid": False}, lines, ExitCode.BAD)
        snapshot.verify()
        blocks = [block for block in snapshot.blocks.values() if not block.external]
        pages = sum(block.data_pages for block in blocks)
        zero = sum(block.zero_pages for block in blocks)
        count = len(snapshot.blocks)
        order = snapshot.bitmap_order
        data |= {"bitmap_order": order, "notes": []}
        if order is not None:
            better = better_order(snapshot.source, snapshot.layouts, order)
            notes = [] if better is None else [says_better(better)]
            data["notes"] = notes
            lines += [f"note      {note}" for note in notes]
        data |= {"block_count": count, "data_pages": pages, "zero_pages": zero}
        lines.append(
            f"{printable(args.snapshot)}: well-formed and complete: {counted(count, 'block')}, "
            f"{counted(pages, 'data page')}, {counted(zero, 'zero page')}"
        )
        if args.deep:
            _look_deeper(args, snapshot, data, lines)
    return Outcome(data, lines)


def _is_pipe(path: str) -> bool:
    """Return whether the snapshot is a pipe, which has no file with a seal beside it."""
    return PipeReader.is_pipe(read_from(path, None)[0])


def _check_base(
    args: argparse.Namespace, snapshot: Snapshot, data: dict[str, Any], lines: list[str]
) -> bool:
    """Compare the base of an increment with its seal; return whether it is intact."""
    from pyqmigrate.snapshot.increment import IncrementSnapshot

    assert isinstance(snapshot, IncrementSnapshot)
    path = snapshot.base.source.name
    check = _check_seal(args, path)
    data |= {"base": path, "base_seal": None if check is None else check.to_json()}
    if check is None:
        return True
    lines += _about(path, check)
    return check.intact


def _check_seal(args: argparse.Namespace, path: str) -> SealCheck | None:
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
    verdict = "nothing has changed" if check.intact else "NOT as it was sealed"
    return [
        *lines,
        f"{printable(shown_seal(snapshot, check.seal))}: {verdict}: {check.algorithm} of "
        f"{show_size(check.size)}, {show_size(check.bytes_read)} read in {check.seconds:.2f} s, "
        f"{rate} MiB/s",
    ]


def _look_deeper(
    args: argparse.Namespace, snapshot: Snapshot, data: dict[str, Any], lines: list[str]
) -> None:
    stale = stale_pages(snapshot, channels=args.channels)
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
        "device state cannot be separated: it has no description, or the description does not fit"
        if found.opaque_tail
        else f"device state: {counted(number, 'section')} decoded"
    )
