"""Show what a snapshot contains.

``--host`` compares the CPU features that the guest uses (XCR0, CR4, EFER, and registers that not every
processor has) with this host's processor and with what its QEMU can give, without a guest. It is for x86.
The exit code is 1 if something is missing; the report says what, and what to do. Features that a guest
uses without switching them on, such as AES, do not show: the CPU model should be the one that it was saved
with, which is taken from the record of vm save unless ``--cpu`` names another. ``vm check --for-restore``
compares with the command line of a restore.

``--xml`` prints only the domain's XML that libvirt stored before the stream, also for a compressed or
unfinished image.

JSON: ``snapshot``; ``kind`` (mapped-ram, stream or increment); ``machine`` (perhaps empty);
``capabilities`` (names); ``target_page_bits`` and ``uuid`` (null: the file does not record
them); ``offset`` where the stream starts and ``end`` where it ends; ``file_size`` and
``bytes_allocated``; ``total_ram`` in bytes;
``complete`` (false: device state may be cut off); ``opaque_tail`` (true: the last device sections
could not be separated and are not listed); ``background`` (true: a background snapshot as QEMU wrote
it, without RAM's END and bitmaps); ``bitmap_order`` (little or big, as the bitmaps were read; null in
a sequential stream); ``blocks``, a list of ``name``, ``length``,
``page_size``, ``pages``, ``data_pages``, ``zero_pages``, ``bitmap_offset``, ``pages_offset`` (null
in a sequential stream), ``external`` (true: the content is in another file, and page counts are null);
``increment`` (null, or ``base``, its path as opened; ``recorded_base``; ``base_identity``, an object
of ``size``, ``mtime_ns``, ``seal`` (null without one); ``created_ns``; ``changed_pages``; ``changed_bytes``;
``share_of_base``, their number divided by that of the base's data pages, null if it has none;
``changed_blocks``, the changed pages by block);
``libvirt`` (null, or ``version``, ``format``, ``was_running``, ``xml``, ``cookie``);
``written_by``, an object of ``qemu`` (the oldest version that can have written it, or null),
``reasons``, ``by_libvirt``; ``run_state`` after a load (null: not recorded); ``loadable`` (by a
QEMU with the same machine), ``obstacles`` to a load and ``remarks``, texts; ``sections``, a list
of ``kind`` (start, part, end, full, command), ``section_id``, ``name``, ``instance_id``,
``version_id``, ``offset``, ``length``, ``body_offset``, ``body_length``. Offsets are absolute in
the file, or in the decompressed stream if libvirt compressed it; offsets and lengths are in bytes.
With --host also ``host``, an object of ``possible``, ``cpus`` (their number), ``xcr0``, ``xsave_size``,
``features`` (a list of ``name`` and ``why``), ``msrs`` (names of QEMU's states), ``accelerator``, ``qemu``
(the executable, or null), ``model``, ``missing`` (features), ``obstacles`` and ``notes`` (sentences).

If the stream of an image by libvirt cannot be read (lzop), the header is shown, with exit code 5; JSON:
``snapshot``, ``offset``, ``libvirt``, and ``unreadable``, which says why and what to do.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.host import add_host, check_host_options, host_data, host_lines, host_report
from pyqmigrate.cli.opening import add_snapshot, opened
from pyqmigrate.cli.outcome import Outcome, counted, printable, table
from pyqmigrate.cli.sizes import show_size
from pyqmigrate.cli.standard_streams import read_from
from pyqmigrate.enums import Format
from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.libvirt import LibvirtHeader
from pyqmigrate.format.stream.wire import Section
from pyqmigrate.io.pipe import PipeReader
from pyqmigrate.io.stream_file import open_source, read_libvirt_header
from pyqmigrate.snapshot.base import Block, Snapshot
from pyqmigrate.snapshot.provenance import Provenance, provenance

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "info", _run, __doc__)
    add_snapshot(parser)
    parser.add_argument("--xml", action="store_true", help="print only the XML in libvirt's header")
    add_host(parser)


def _run(args: argparse.Namespace) -> Outcome:
    check_host_options(args)
    if args.xml:
        return _xml(args)
    try:
        return _whole(args)
    except NotSupported as error:
        if args.host:
            raise
        header = _header(args)
        if header is None:
            raise
        return _header_alone(args, header, str(error))


def _whole(args: argparse.Namespace) -> Outcome:
    with opened(args, args.snapshot) as snapshot:
        origin = provenance(snapshot)
        data = {"snapshot": args.snapshot, **_data(snapshot, origin)}
        lines = list(_lines(snapshot, data, origin))
        if not args.host:
            return Outcome(data, lines)
        report = host_report(args, snapshot)
        data["host"] = host_data(report)
        code = ExitCode.DONE if report.possible else ExitCode.BAD
        return Outcome(data, [*lines, "", *host_lines(report)], code)


def _header(args: argparse.Namespace) -> LibvirtHeader | None:
    """Return libvirt's header at the start of the file, None if there is none."""
    path, offset = read_from(args.snapshot, args.offset)
    if PipeReader.is_pipe(path):
        return None  # the pipe is past it
    with contextlib.closing(open_source(path)) as source:
        if offset is not None or source.offset:
            return None
        return read_libvirt_header(source)


def _header_alone(args: argparse.Namespace, header: LibvirtHeader, why: str) -> Outcome:
    was = "running" if header.was_running else "paused"
    cookie = "with" if header.cookie else "without"
    return Outcome(
        {
            "snapshot": args.snapshot,
            "offset": header.stream_offset,
            "libvirt": _libvirt(header),
            "unreadable": why,
        },
        [
            f"libvirt   {header.format.name.lower()} image, the guest was {was}; {cookie} a cookie",
            f"stream    from {header.stream_offset:#x}: {printable(why)}",
            "XML       info --xml prints it",
        ],
        ExitCode.NOT_SUPPORTED,
    )


def _xml(args: argparse.Namespace) -> Outcome:
    # The stream behind the header is not read: it may be compressed or unfinished.
    path, offset = read_from(args.snapshot, args.offset)
    with contextlib.closing(open_source(path, allow_pipe=True)) as source:
        if offset is not None or source.offset:
            raise UsageError("--xml reads the header at the start of the file: leave out --offset")
        header = read_libvirt_header(source)
    if header is None:
        raise UsageError(f"{args.snapshot!r} has no libvirt header, and so no XML")
    xml = header.xml
    return Outcome(
        {"snapshot": args.snapshot, "xml": xml}, [printable(line) for line in xml.splitlines()]
    )


def _data(snapshot: Snapshot, origin: Provenance) -> dict[str, Any]:
    stream = snapshot.stream
    return {
        "kind": str(snapshot.format),
        "machine": stream.machine,
        "capabilities": list(stream.capabilities),
        "target_page_bits": stream.target_page_bits,
        "uuid": _uuid(stream.uuid),
        "offset": snapshot.offset,
        "end": stream.end,
        "file_size": snapshot.size,
        "bytes_allocated": snapshot.allocated,
        "total_ram": stream.total_ram,
        "complete": stream.complete,
        "opaque_tail": stream.opaque_tail,
        "background": stream.background,
        "bitmap_order": snapshot.bitmap_order,
        "increment": _increment(snapshot),
        "libvirt": _libvirt(snapshot.libvirt),
        "written_by": {
            "qemu": None if origin.qemu is None else ".".join(map(str, origin.qemu)),
            "reasons": list(origin.reasons),
            "by_libvirt": origin.libvirt,
        },
        "run_state": origin.run_state,
        "loadable": origin.loadable,
        "obstacles": list(origin.obstacles),
        "remarks": list(origin.remarks),
        "blocks": [_block(block) for block in snapshot.blocks.values()],
        "sections": [
            section._asdict() | {"kind": section.kind.name.lower()} for section in stream.sections
        ],
    }


def _increment(snapshot: Snapshot) -> dict[str, Any] | None:
    if snapshot.format is not Format.INCREMENT:
        return None
    from pyqmigrate.snapshot.increment import IncrementSnapshot

    assert isinstance(snapshot, IncrementSnapshot)
    header, seal = snapshot.header, snapshot.header.base.seal
    whole = sum(block.data_pages for block in snapshot.base.blocks.values())
    return {
        "base": snapshot.base.source.name,
        "recorded_base": header.base_path,
        "base_identity": {
            "size": header.base.size,
            "mtime_ns": header.base.mtime_ns,
            "seal": None if seal is None else seal.hex(),
        },
        "created_ns": header.created_ns,
        "changed_pages": snapshot.changed_pages,
        "changed_bytes": header.changed_bytes,
        "share_of_base": snapshot.changed_pages / whole if whole else None,
        "changed_blocks": {name: block.changed_pages for name, block in snapshot.blocks.items()},
    }


def _uuid(data: bytes | None) -> str | None:
    return None if data is None else str(uuid.UUID(bytes=data))


def _libvirt(header: LibvirtHeader | None) -> dict[str, Any] | None:
    if header is None:
        return None
    return {
        "version": header.version,
        "format": header.format.name.lower(),
        "was_running": header.was_running,
        "xml": header.xml,
        "cookie": header.cookie,
    }


def _block(block: Block) -> dict[str, Any]:
    external, layout = block.external, block.layout
    pages, data_pages = block.num_pages, None if external else block.data_pages
    return {
        "name": block.name,
        "length": block.length,
        "page_size": block.page_size,
        "pages": pages,
        "data_pages": data_pages,
        "zero_pages": None if data_pages is None else pages - data_pages,
        "bitmap_offset": layout.bitmap_offset if layout else None,
        "pages_offset": layout.pages_offset if layout else None,
        "external": external,
    }


def _lines(snapshot: Snapshot, data: dict[str, Any], origin: Provenance) -> Iterator[str]:
    stream = snapshot.stream
    yield f"machine   {printable(stream.machine) or '(none: loads on any)'}"
    yield f"file      {show_size(snapshot.size)}, {show_size(snapshot.allocated)} allocated"
    yield f"stream    {snapshot.offset:#x} to {stream.end:#x}, {snapshot.format}"
    if (increment := data["increment"]) is not None:
        share = increment["share_of_base"]
        yield f"base      {printable(increment['base'])}"
        yield (
            f"increment {counted(increment['changed_pages'], 'page')}, "
            f"{show_size(increment['changed_bytes'])}"
            + ("" if share is None else f", {share:.1%} of the base's data")
        )
    if stream.capabilities:
        yield f"requires  {', '.join(printable(name) for name in stream.capabilities)}"
    if stream.uuid is not None:
        yield f"uuid      {_uuid(stream.uuid)}"
    if snapshot.libvirt is not None:
        was = "running" if snapshot.libvirt.was_running else "paused"
        yield f"libvirt   {snapshot.libvirt.format.name.lower()} image, the guest was {was}"
    if origin.qemu is not None:
        major, minor = origin.qemu
        why = ", ".join(printable(reason) for reason in origin.reasons)
        yield f"written   by QEMU {major}.{minor} or later, or for it ({why})"
    if origin.run_state is not None:
        yield f"guest     {printable(origin.run_state)}"
    yield f"QEMU      {'would load it' if origin.loadable else 'would not load it'}"
    yield from (f"          {printable(text)}" for text in (*origin.obstacles, *origin.remarks))
    yield f"RAM       {show_size(stream.total_ram)}"
    if not stream.complete:
        yield "complete  RAM yes; the end of the device state was not found"
    elif stream.opaque_tail:
        yield "complete  yes; the last device sections cannot be separated without a description"
    else:
        yield "complete  yes"
    yield ""
    yield from table(
        ("block", "length", "page size", "data pages", "zero pages", "pages at"),
        [
            (
                b["name"],
                show_size(b["length"]),
                show_size(b["page_size"]),
                *(
                    ("-", "-", "in another file")
                    if b["external"]
                    else (b["data_pages"], b["zero_pages"], _place(b["pages_offset"]))
                ),
            )
            for b in data["blocks"]
        ],
    )
    yield ""
    yield from table(
        ("section", "kind", "instance", "version", "offset", "length"),
        list(_section_rows(stream.sections)),
        left=2,
    )


def _place(pages_offset: int | None) -> str:
    return "in records" if pages_offset is None else f"{pages_offset:#x}"


def _section_rows(sections: Iterable[Section]) -> Iterator[tuple[object, ...]]:
    """Yield a row for each section; the repeated parts of a live save share one row."""
    for (kind, name, instance, version), group in itertools.groupby(
        sections, key=lambda s: (s.kind, s.name, s.instance_id, s.version_id)
    ):
        first, *others = group
        times = f" x {len(others) + 1}" if others else ""
        length = first.length + sum(section.length for section in others)
        yield (
            name,
            kind.name.lower() + times,
            instance,
            version,
            f"{first.offset:#x}",
            show_size(length),
        )
