"""Show how two snapshots differ: blocks, pages, device state.

A and B are snapshots of any kind: whole ones, increments, sequential streams. The guests are compared,
not the files: a page of zeros is equal to a page that is not stored. The exit code is 0 if they are
equal, 1 if anything differs.

If both files have seals (SNAPSHOT.seal) and were not modified since, only the MiB with different digests
are read. Of an increment only the changed pages are read, if the other one is its base or another
increment of the base. ``--no-seals`` reads everything, for files whose content may have changed without
a new time of modification.

``--pages`` lists the ranges of pages that differ, with guest-physical addresses where they are known.
``--fields`` lists the fields of devices that differ.

JSON: ``a``, ``b`` (paths); ``equal``; ``machines``, the two machine types; ``only_in_a``, ``only_in_b``
(names of blocks); ``differing_pages``; ``blocks``, those of both, a list of ``name``, ``lengths`` (two, in
bytes), ``page_size``, ``pages`` (of both), ``compared_pages`` (the others are equal by the seals or the
base), ``differing_pages``, ``zero_in`` (how many of these are zero in A, and in B), ``external`` (true: the
content is in another file, and not compared) and with --pages ``ranges``, a list of ``first``, ``end`` (not
included) and ``address`` (of the first page, or null); ``devices``, those that differ, a list of ``name``,
``instance_id``, ``only_in`` (null, a or b), ``size_a``, ``size_b`` (bytes, null where it is missing) and with
--fields ``fields``, a list of ``path``, ``value_a``, ``value_b`` (as in devices) and ``only_in``;
``tail_differs`` (true: device state differs that cannot be separated into devices); ``seals`` (whether they were used);
``bytes_read`` of each snapshot; ``seconds``; ``notes`` (sentences).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from pyqmigrate.analysis.comparison import diff
from pyqmigrate.analysis.report import BlockDiff, DeviceDiff, DiffReport, FieldDiff
from pyqmigrate.cli.arguments import Verbs, add_base, add_channels, add_page_size, add_verb
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.outcome import Outcome, counted, printable, table
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import show_size
from pyqmigrate.format.device.values import State, Value

__all__ = ["add_parser"]

_FIELDS_SHOWN = 64  # of one device
_BYTES_SHOWN = 16
_VALUES_SHOWN = 8


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "diff", _run, __doc__)
    parser.add_argument("a", metavar="A", help="a snapshot")
    parser.add_argument("b", metavar="B", help="another snapshot")
    parser.add_argument("--pages", action="store_true", help="list the pages that differ")
    parser.add_argument("--fields", action="store_true", help="list the device fields that differ")
    parser.add_argument(
        "--no-seals", action="store_true", help="read everything, also where seals are equal"
    )
    add_page_size(parser)
    add_base(parser)
    add_channels(parser)


def _run(args: argparse.Namespace) -> Outcome:
    with shown("compare") as show:
        report = diff(
            args.a,
            args.b,
            pages=args.pages,
            fields=args.fields,
            seals=not args.no_seals,
            channels=args.channels,
            page_size=args.page_size,
            base=args.base,
            progress=show,
        )
    code = ExitCode.DONE if report.equal else ExitCode.BAD
    return Outcome(report.to_json(), [*_lines(report)], code)


def _lines(report: DiffReport) -> Iterator[str]:
    if report.machines[0] != report.machines[1]:
        yield f"machine types: {' and '.join(printable(m) or 'none' for m in report.machines)}"
    for letter, names in (("A", report.only_in_a), ("B", report.only_in_b)):
        yield from (f"block {printable(name)!r} is only in {letter}" for name in names)
    yield from _blocks(report)
    for device in report.devices:
        yield from _device(device)
    if report.tail_differs:
        yield "device state differs that cannot be separated into devices"
    yield from (f"note      {printable(note)}" for note in report.notes)
    yield _verdict(report)


def _blocks(report: DiffReport) -> Iterator[str]:
    rows = [
        (block.name, block.pages, block.differing_pages, *block.zero_in)
        for block in report.blocks
        if block.differing_pages
    ]
    if rows:
        yield from table(("block", "pages", "differ", "zero in A", "zero in B"), rows)
    for block in report.blocks:
        if block.lengths[0] != block.lengths[1]:
            a, b = map(show_size, block.lengths)
            yield f"block {printable(block.name)!r} has {a} in A and {b} in B"
        if block.external:
            yield f"block {printable(block.name)!r} is in another file, and was not compared"
    ranges = [row for block in report.blocks for row in _ranges(block)]
    if ranges:
        yield from table(("block", "from page", "pages", "guest address"), ranges)


def _ranges(block: BlockDiff) -> Iterator[tuple[object, ...]]:
    for each in block.ranges or ():
        address = "unknown" if each.address is None else hex(each.address)
        yield block.name, each.first, each.end - each.first, address


def _device(device: DeviceDiff) -> Iterator[str]:
    name = f"{printable(device.name)}, instance {device.instance_id}"
    if device.only_in is not None:
        yield f"device {name}: only in {device.only_in.upper()}"
        return
    yield f"device {name}: differs"
    fields = device.fields or ()
    yield from (f"  {_field(field)}" for field in fields[:_FIELDS_SHOWN])
    if len(fields) > _FIELDS_SHOWN:
        yield f"  ... and {len(fields) - _FIELDS_SHOWN} more fields; --json lists all"


def _field(field: FieldDiff) -> str:
    path = printable(field.path)
    if field.only_in is not None:
        value = field.a if field.only_in == "a" else field.b
        return f"{path}: only in {field.only_in.upper()}: {_shown(value)}"
    if isinstance(field.a, tuple) and isinstance(field.b, tuple) and len(field.a) == len(field.b):
        return f"{path}: {_elements(field.a, field.b)}"
    if isinstance(field.a, bytes) and isinstance(field.b, bytes) and len(field.a) == len(field.b):
        return f"{path}: {_from_first_difference(field.a, field.b)}"
    return f"{path}: {_shown(field.a)} -> {_shown(field.b)}"


def _elements(a: Sequence[Value], b: Sequence[Value]) -> str:
    """Return the elements of two arrays that differ, with their numbers."""
    unequal = [number for number, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]]
    shown = [f"[{n}] {_shown(a[n])} -> {_shown(b[n])}" for n in unequal[:_VALUES_SHOWN]]
    more = f" ... {len(unequal)} values" if len(unequal) > _VALUES_SHOWN else ""
    return ", ".join(shown) + more


def _from_first_difference(a: bytes, b: bytes) -> str:
    first = next(number for number, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
    where = f"from byte {first} of {len(a)}: " if len(a) > _BYTES_SHOWN else ""
    if not where:
        return f"{_shown(a)} -> {_shown(b)}"
    end = first + _BYTES_SHOWN
    return f"{where}{a[first:end].hex(' ')} -> {b[first:end].hex(' ')}"


def _shown(value: Value) -> str:
    if isinstance(value, bytes):
        more = f" ... {len(value)} bytes" if len(value) > _BYTES_SHOWN else ""
        return value[:_BYTES_SHOWN].hex(" ") + more
    if isinstance(value, tuple):
        more = f" ... {len(value)} values" if len(value) > _VALUES_SHOWN else ""
        return " ".join(map(_shown, value[:_VALUES_SHOWN])) + more
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, State):
        return "(empty)"
    return hex(value) if value > 9 else str(value)


def _verdict(report: DiffReport) -> str:
    names = f"{printable(report.a)} and {printable(report.b)}"
    read = f"{show_size(report.bytes_read)} of each read in {report.seconds:.2f} s"
    if report.equal:
        return f"{names} are equal: {read}"
    blocks = sum(1 for block in report.blocks if block.differing_pages)
    return (
        f"{names} differ: {counted(report.differing_pages, 'page')} in {counted(blocks, 'block')}, "
        f"{counted(len(report.devices), 'device')}: {read}"
    )
