"""Convert a snapshot into another form.

SNAPSHOT is a snapshot of any kind; DST becomes, as ``--to`` says:

``mapped-ram``  a mapped-ram file: fast to restore, in parallel or at once
``stream``      a sequential stream, as every QEMU loads it
``raw``         a directory of raw files, one a RAM block (as unpack)
``elf``         an ELF core of the guest's physical memory: for gdb, drgn, crash, volatility3
``lime``        a LiME file of it: for volatility3
``libvirt``     a save image that virsh restore takes, with the header of an older one (``--like``)

A sequential stream is read once, front to back, into a mapped-ram file and raw files. For these
SNAPSHOT may be a pipe (``ssh HOST cat OLD | pyqmigrate convert - DST --to mapped-ram``), or a
stream compressed with gzip, bzip2, xz or zstd (which needs Python 3.14, or
``pip install zstandard``).

Device state is carried over byte for byte. DST appears only when it is whole and durable;
it cannot be SNAPSHOT, under whatever name. With ``-`` as DST a sequential stream goes to a pipe, and
mapped-ram, elf and lime go into the file that standard output is redirected to; what is printed
otherwise goes to standard error, and the reader of a pipe has to look at the exit code.
``--memory NAME=FILE`` gives the content of a block that SNAPSHOT only lists (x-ignore-shared).

An image of libvirt's gets its XML from the image that ``--like`` names, which has to be of the same
domain (virsh save); ``virsh save-image-edit DST`` changes it afterwards. ``virsh restore`` needs
libvirt 11.2 or later for ``--image-format sparse``.

For elf and lime the guest-physical addresses of RAM blocks are found from the machine type and
the device state; ``info SNAPSHOT`` lists the blocks. ``--map NAME@ADDRESS[+OFFSET[,SIZE]]`` places
one by hand (a memory module that was plugged in), instead of what would be found for it. Numbers
are bytes, decimal or 0x. ``--max-ram-below-4g`` is for a PC whose device state does not record how
RAM is split at 4 GiB; without it such a snapshot is refused.

--describe has device state described that SNAPSHOT does not describe (see vm save --describe): a
mapped-ram file or a stream then carries the description, and an elf file has registers. A QEMU of
the VM's machine, which never runs, makes it; the VM's command line is that of the record beside
SNAPSHOT (SNAPSHOT.vm.json), or comes after --. Neither disks nor sockets of the VM are opened.
``--byte-order`` specifies a Power guest's in an elf file where there is no device state to tell.

JSON: ``snapshot``; ``target``; ``to``; for raw what unpack has, otherwise what pack has, but for
elf and lime, instead of ``unaligned_blocks``: ``ranges``, a list of ``block``, ``address``,
``offset`` in the block and ``length``; ``unplaced``, the blocks that are left out; ``cpus``, how
many have their registers in it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import asdict

from pyqmigrate.cli.arguments import Verbs, add_channels, add_direct_io, add_verb
from pyqmigrate.cli.describe import HINT, add_describe, description_for
from pyqmigrate.cli.opening import add_snapshot, opened
from pyqmigrate.cli.outcome import Outcome, counted, printable, table
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import read_size, show_rate, show_size
from pyqmigrate.cli.standard_streams import write_to
from pyqmigrate.enums import Format
from pyqmigrate.errors import UsageError
from pyqmigrate.export.convert import convert
from pyqmigrate.export.image import ImageReport
from pyqmigrate.export.raw import RawReport
from pyqmigrate.format.address_space.physical_map import parse_placement
from pyqmigrate.format.address_space.placement import GivenPlacement
from pyqmigrate.io.memory import FileMemory
from pyqmigrate.snapshot.save.writer import Sparse

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "convert", _run, __doc__)
    add_snapshot(parser)
    parser.add_argument(
        "target", metavar="DST", help="what to write; - is standard output (see above)"
    )
    parser.set_defaults(writes="target")
    forms = [str(form) for form in Format]
    parser.add_argument("--to", choices=forms, required=True, help="the form of DST")
    parser.add_argument(
        "--memory",
        metavar="NAME=FILE",
        action="append",
        default=[],
        type=_read_memory,
        help="the content of a block; may be repeated",
    )
    parser.add_argument(
        "--map",
        metavar="NAME@ADDRESS[+OFFSET[,SIZE]]",
        action="append",
        default=[],
        type=_read_placement,
        help="where a block is in an elf or lime file; may be repeated",
    )
    parser.add_argument(
        "--max-ram-below-4g",
        metavar="SIZE",
        type=read_size,
        default=None,
        help="what -machine max-ram-below-4g was, where the device state does not say it",
    )
    parser.add_argument(
        "--byte-order",
        choices=["little", "big"],
        default=None,
        help="of the guest, in an elf file (default: as the device state has it)",
    )
    parser.add_argument(
        "--like", metavar="IMAGE", help="an image of the same domain, for an image of libvirt's"
    )
    parser.add_argument(
        "--image-format",
        choices=["raw", "sparse"],
        default=None,
        help="of an image of libvirt's (default: as IMAGE, raw where that is compressed)",
    )
    add_describe(parser)
    add_channels(parser)
    add_direct_io(parser)
    parser.add_argument(
        "--sparse",
        choices=[str(policy) for policy in Sparse],
        default="auto",
        help="what becomes of zero pages in a mapped-ram, elf or lime file (default: auto)",
    )


def _read_memory(text: str) -> tuple[str, str]:
    name, equals, path = text.rpartition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, path


def _read_placement(text: str) -> GivenPlacement:
    try:
        return parse_placement(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(args: argparse.Namespace) -> Outcome:
    if args.describe and args.to == Format.RAW:
        raise UsageError("--describe is not possible with --to raw: raw files hold RAM only")
    with (
        opened(args, args.snapshot, one_pass=not args.describe) as snapshot,
        shown("convert") as show,
        contextlib.ExitStack() as stack,
    ):
        memories = {}
        for name, path in args.memory:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, fd)
            memories[name] = FileMemory(fd)
        description = description_for(args, snapshot)
        report = convert(
            snapshot,
            write_to(args.target, forward=_why_a_file(args.to)),
            to=args.to,
            channels=args.channels,
            direct_io=args.direct_io,
            sparse=args.sparse,
            memories=memories,
            placements=args.map,
            max_ram_below_4g=args.max_ram_below_4g,
            byte_order=args.byte_order,
            like=args.like,
            image_format=args.image_format,
            description=description,
            progress=show,
        )
    data = {"snapshot": args.snapshot, "target": args.target, "to": args.to, **asdict(report)}
    front = f"{printable(args.target)}: {args.to}, {show_size(report.bytes_allocated)} allocated"
    if isinstance(report, RawReport):
        return Outcome(data, [f"{front}, {len(report.blocks)} blocks, {report.seconds:.2f} s"])
    rate = show_rate(report.bytes_written, report.seconds)
    lines = [
        f"{front}, {report.data_pages} data pages, {report.zero_pages} zero pages",
        f"{show_size(report.bytes_written)} written in {report.seconds:.2f} s, {rate} MiB/s",
    ]
    if isinstance(report, ImageReport):
        registers = _registers(report) if args.to == Format.ELF else []
        lines = [*_ranges(report), *lines, *registers, *_left_out(report)]
    return Outcome(data, lines)


def _why_a_file(form: str) -> str | None:
    """Why this form cannot go through a pipe; None if it can."""
    if form == Format.RAW:
        return "raw files go into a directory"
    if form == Format.LIBVIRT:
        return "an image of libvirt's gets its name when it is whole"
    return None if form == Format.SEQUENTIAL else f"{form} has its pages at fixed places"


def _ranges(report: ImageReport) -> list[str]:
    rows = [
        (one.block, f"{one.address:#x}", f"{one.offset:#x}", f"{one.length:#x}")
        for one in report.ranges
    ]
    return table(("block", "address", "from byte", "length"), rows)


def _registers(report: ImageReport) -> list[str]:
    if report.cpus:
        return [f"registers of {counted(report.cpus, 'CPU')}"]
    return [f"no registers: the file does not describe its devices ({HINT} does)"]


def _left_out(report: ImageReport) -> list[str]:
    names = ", ".join(printable(name) for name in report.unplaced)
    return [f"not in it, for want of an address: {names}"] if names else []
