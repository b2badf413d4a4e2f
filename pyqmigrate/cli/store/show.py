"""Show what a store knows of one snapshot.

JSON: ``store``; the keys of an object of ``store list``; ``blocks``, a list of ``name``, ``length`` and
``page_size``; ``companions``, the files that are shown beside it, an object of suffix and size;
``pack_names``, the packs that it needs; ``device_bytes`` (that are not pages of RAM).
"""

from __future__ import annotations

import argparse

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.outcome import Outcome, printable
from pyqmigrate.cli.sizes import show_size
from pyqmigrate.cli.store.opening import add_store, entry_data, opened_store, shown_time
from pyqmigrate.store.store import NoSnapshot

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "show", _run, __doc__)
    add_store(parser)
    parser.add_argument("name", metavar="NAME", help="a snapshot of the store")


def _run(args: argparse.Namespace) -> Outcome:
    with opened_store(args) as store, store.open_file(args.name) as file:
        found = next(iter(store.list([args.name])), None)
        if found is None:
            raise NoSnapshot(f"there is no snapshot {args.name!r} in {store.name}")
        beside = {suffix: len(data) for suffix, data in file.companions.items()}
        snapshot = file.snapshot
    head = snapshot.head
    device_bytes = sum(len(extent.data) for extent in snapshot.extents)
    data = {
        "store": args.store,
        **entry_data(found),
        "blocks": [
            {"name": block.name, "length": block.length, "page_size": block.page_size}
            for block in head.blocks
        ],
        "companions": beside,
        "pack_names": [pack.hex() for pack in snapshot.packs],
        "device_bytes": device_bytes,
    }
    counts = head.counts
    blocks = ", ".join(f"{block.name} {show_size(block.length)}" for block in head.blocks)
    lines = [
        f"snapshot  {head.name}",
        f"saved     {shown_time(head.mtime_ns)}",
        f"added     {shown_time(head.added_ns)}, from a {head.source} file",
        f"machine   {head.machine or '(not recorded)'}",
        f"uuid      {data['uuid'] or '(not recorded)'}",
        f"parent    {head.parent or '(none)'}",
        f"size      {show_size(head.size)}; {show_size(device_bytes)} are not pages of RAM",
        f"blocks    {blocks}",
        f"pages     {counts.pages} stored, {counts.same_pages} of one word",
        f"new       {counts.new_pages} pages, {show_size(counts.new_bytes)}",
        f"packs     {len(snapshot.packs)}",
        f"beside    {', '.join(f'{head.name}{suffix}' for suffix in beside)}",
        *(f"label     {name}={text}" for name, text in head.labels.items()),
    ]
    return Outcome(data, [printable(line) for line in lines])
