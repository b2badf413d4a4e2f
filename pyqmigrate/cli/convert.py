"""Convert a snapshot into another form.

SNAPSHOT is a snapshot of any kind. ``--to`` chooses what DST becomes:

  ``mapped-ram``  a mapped-ram file: fast to restore, in parallel or at once
  ``stream``      a sequential stream, which every QEMU loads
  ``raw``         a directory of raw files, one for each RAM block (like unpack)
  ``elf``         an ELF core of the guest's physical memory, for gdb, drgn, crash and volatility3
  ``lime``        a LiME file of the guest's physical memory, for volatility3
  ``libvirt``     a save image for virsh restore, with the header of an older image (``--like``)

An increment is read together with its base, so that DST contains all of the guest's memory.

A sequential stream is read once, front to back, to make a mapped-ram file or raw files. SNAPSHOT may
then be a pipe (``ssh HOST cat OLD | pyqmigrate convert - DST --to mapped-ram``), or compressed with
gzip, bzip2, xz or zstd (which needs Python 3.14, or ``pip install zstandard``).

Device state is copied byte for byte. DST appears only when it is complete and durable; it must not be
SNAPSHOT, under any name. With ``-`` as DST a sequential stream goes to a pipe, and mapped-ram, elf and
lime go into the file that standard output is redirected to. Other output then goes to standard error,
and the reader of a pipe has to check the exit code. ``--memory NAME=FILE`` supplies the content of a
block that SNAPSHOT lists without content (x-ignore-shared).

An image for libvirt gets its XML from the image given by ``--like``, which must be of the same domain
(virsh save); ``virsh save-image-edit DST`` changes it afterwards. ``virsh restore`` needs libvirt
11.2 or later for ``--image-format sparse``.

For elf and lime, the guest-physical addresses of RAM blocks are found from the machine type and the
device state; ``info SNAPSHOT`` lists the blocks. ``--map NAME@ADDRESS[+OFFSET[,SIZE]]`` sets the place
of a block by hand, for example of a hot-plugged memory module. Numbers are bytes, decimal or 0x.
``--max-ram-below-4g`` is for a PC whose device state does not record how RAM is split at 4 GiB;
without it such a snapshot is refused.

--describe adds a description of device state that SNAPSHOT does not describe (see vm save --describe):
a mapped-ram file or a stream then contains it, and an elf file has registers. A QEMU of the VM's
machine, which never runs, makes it. The VM's command line is the one in the record beside SNAPSHOT
(SNAPSHOT.vm.json), or comes after --. The VM's disks and sockets are not opened. Raw files cannot
hold a description. ``--byte-order`` is that of a Power guest, for an elf file of a snapshot without
device state.

JSON: ``snapshot``; ``target``; ``to``; for raw the keys of unpack, otherwise those of pack, except that
elf and lime have, instead of ``unaligned_blocks``: ``ranges``, a list of ``block``, ``address``,
``offset`` in the block and ``length``; ``unplaced``, the blocks that are left out; ``cpus``, the number
of CPUs whose registers are in the file.
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
    forms = [str(form) for form in Format if form is not Format.INCREMENT]
    parser.add_argument("--to", choices=forms, required=True, help="the form of DST")
    parser.add_argument(
        "--memory",
        metavar="NAME=FILE",
        action="append",
        default=[],
        type=_read_memory,
        help="the content of a block; can be given several times",
    )
    parser.add_argument(
        "--map",
        metavar="NAME@ADDRESS[+OFFSET[,SIZE]]",
        action="append",
        default=[],
        type=_read_placement,
        help="the address of a block in an elf or lime file; can be given several times",
    )
    parser.add_argument(
        "--max-ram-below-4g",
        metavar="SIZE",
        type=read_size,
        default=None,
        help="the VM's -machine max-ram-below-4g, if the device state does not record it",
    )
    parser.add_argument(
        "--byte-order",
        choices=["little", "big"],
        default=None,
        help="the guest's byte order, for an elf file (default: from the device state)",
    )
    parser.add_argument(
        "--like", metavar="IMAGE", help="for libvirt: a save image of the same domain"
    )
    parser.add_argument(
        "--image-format",
        choices=["raw", "sparse"],
        default=None,
        help="for libvirt: the format (default: that of IMAGE, or raw if IMAGE is compressed)",
    )
    add_describe(parser)
    add_channels(parser)
    add_direct_io(parser)
    parser.add_argument(
        "--sparse",
        choices=[str(policy) for policy in Sparse],
        default="auto",
        help="which zero pages are allocated in a mapped-ram, elf or lime file (default: auto)",
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
            write_to(args.target, forward=_why_no_pipe(args.to)),
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
    summary = f"{printable(args.target)}: {args.to}, {show_size(report.bytes_allocated)} allocated"
    if isinstance(report, RawReport):
        return Outcome(data, [f"{summary}, {len(report.blocks)} blocks, {report.seconds:.2f} s"])
    rate = show_rate(report.bytes_written, report.seconds)
    lines = [
        f"{summary}, {report.data_pages} data pages, {report.zero_pages} zero pages",
        f"{show_size(report.bytes_written)} written in {report.seconds:.2f} s, {rate} MiB/s",
    ]
    if isinstance(report, ImageReport):
        registers = _registers(report) if args.to == Format.ELF else []
        lines = [*_ranges(report), *lines, *registers, *_unplaced(report)]
    return Outcome(data, lines)


def _why_no_pipe(form: str) -> str | None:
    """Return why this form cannot go through a pipe, None if it can."""
    if form == Format.RAW:
        return "raw files go into a directory"
    if form == Format.LIBVIRT:
        return "an image for libvirt gets its name when it is complete"
    return None if form == Format.SEQUENTIAL else f"{form} has its pages at fixed places"


def _ranges(report: ImageReport) -> list[str]:
    rows = [
        (place.block, f"{place.address:#x}", f"{place.offset:#x}", f"{place.length:#x}")
        for place in report.ranges
    ]
    return table(("block", "address", "from byte", "length"), rows)


def _registers(report: ImageReport) -> list[str]:
    if report.cpus:
        return [f"registers of {counted(report.cpus, 'CPU')}"]
    return [f"no registers: the file does not describe its devices (use {HINT})"]


def _unplaced(report: ImageReport) -> list[str]:
    names = ", ".join(printable(name) for name in report.unplaced)
    return [f"left out, because their address is not known: {names}"] if names else []
