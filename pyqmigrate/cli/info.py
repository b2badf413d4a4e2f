"""Show what a snapshot holds.

JSON: ``snapshot``; ``machine`` (perhaps empty); ``capabilities`` (names); ``target_page_bits`` and
``uuid`` (null where the file does not state them); ``offset`` where the stream starts and
``end`` where it ends; ``size`` and ``allocated`` of the file in bytes; ``total_ram`` in bytes;
``complete`` (false: device state may be cut off); ``opaque_tail`` (true: the device sections
could not be told apart and are not listed); ``blocks``, a list of ``name``, ``length``,
``page_size``, ``pages``, ``data_pages``, ``zero_pages``, ``bitmap_offset``, ``pages_offset``,
``external`` (true: the content is in another file, and page counts are null); ``sections``, a list
of ``kind`` (start, part, end, full, command), ``section_id``, ``name``, ``instance_id``,
``version_id``, ``offset``, ``length``, ``body_offset``, ``body_length``. Offsets are absolute in
the file; offsets and lengths are in bytes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from pyqmigrate.cli.arguments import Verbs, add_offset, add_verb
from pyqmigrate.cli.outcome import Outcome, printable, table
from pyqmigrate.cli.sizes import show_size
from pyqmigrate.format.elements import Section
from pyqmigrate.snapshot import Snapshot, SnapshotBlock

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "info", _run, __doc__)
    parser.add_argument("snapshot", metavar="SNAPSHOT")
    add_offset(parser)


def _run(args: argparse.Namespace) -> Outcome:
    with Snapshot(args.snapshot, offset=args.offset) as snapshot:
        data = {"snapshot": args.snapshot, **_data(snapshot)}
        return Outcome(data, list(_lines(snapshot, data)))


def _data(snapshot: Snapshot) -> dict[str, Any]:
    stream = snapshot.stream
    return {
        "machine": stream.machine,
        "capabilities": list(stream.capabilities),
        "target_page_bits": stream.target_page_bits,
        "uuid": None if stream.uuid is None else stream.uuid.hex(),
        "offset": snapshot.offset,
        "end": stream.end,
        "size": snapshot.size,
        "allocated": snapshot.allocated,
        "total_ram": stream.total_ram,
        "complete": stream.complete,
        "opaque_tail": stream.opaque_tail,
        "blocks": [_block(block) for block in snapshot.blocks.values()],
        "sections": [
            asdict(section) | {"kind": section.kind.name.lower()} for section in stream.sections
        ],
    }


def _block(block: SnapshotBlock) -> dict[str, Any]:
    here = not block.external
    return {
        "name": block.name,
        "length": block.length,
        "page_size": block.page_size,
        "pages": block.num_pages,
        "data_pages": block.data_pages if here else None,
        "zero_pages": block.zero_pages if here else None,
        "bitmap_offset": block.bitmap_offset,
        "pages_offset": block.pages_offset,
        "external": block.external,
    }


def _lines(snapshot: Snapshot, data: dict[str, Any]) -> Iterator[str]:
    stream = snapshot.stream
    yield f"machine   {printable(stream.machine) or '(none: loads on any)'}"
    yield f"file      {show_size(snapshot.size)}, {show_size(snapshot.allocated)} allocated"
    yield f"stream    {snapshot.offset:#x} to {stream.end:#x}"
    yield f"RAM       {show_size(stream.total_ram)}"
    if not stream.complete:
        yield "complete  RAM yes; the end of the device state was not seen"
    elif stream.opaque_tail:
        yield "complete  yes; without a description its device sections cannot be told apart"
    else:
        yield "complete  yes"
    yield ""
    yield from table(
        ("block", "length", "page size", "data pages", "zero pages", "pages at"),
        [
            (b["name"], show_size(b["length"]), show_size(b["page_size"]),
             *(("-", "-", "in another file") if b["external"] else
               (b["data_pages"], b["zero_pages"], f"{b['pages_offset']:#x}")))
            for b in data["blocks"]
        ],
    )  # fmt: skip
    yield ""
    yield from table(
        ("section", "kind", "instance", "version", "offset", "length"),
        list(_section_rows(stream.sections)), left=2,
    )


def _section_rows(sections: Iterable[Section]) -> Iterator[tuple[object, ...]]:
    """A row a section; the repeated parts of a live save share one."""
    for (kind, name, instance, version), group in itertools.groupby(
        sections, key=lambda s: (s.kind, s.name, s.instance_id, s.version_id)
    ):
        first, *others = group
        times = f" x {len(others) + 1}" if others else ""
        length = first.length + sum(section.length for section in others)
        yield (
            name, kind.name.lower() + times, instance, version, f"{first.offset:#x}",
            show_size(length),
        )
