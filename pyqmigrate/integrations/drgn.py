"""drgn on a snapshot of any kind, without a conversion.

    from pyqmigrate.integrations.drgn import program

    prog = program("/backups/store#crashed")
    prog.load_debug_info(["vmlinux"])

or as a command, interactive or with a script::

    python -m pyqmigrate.integrations.drgn /backups/store#crashed -s vmlinux

The program is that of the ELF core of the snapshot: its memory by physical address and, for a Linux
guest, by the kernel's own addresses, the registers of its CPUs, and the VMCOREINFO. The head of the core
is a file in memory (memfd), from which drgn takes the registers, which it accepts from a core only; memory is
read from the snapshot when drgn reads it.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import weakref
from collections.abc import Sequence
from functools import partial

import drgn
import drgn.cli

from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.export.elf_layout import ElfLayout
from pyqmigrate.export.elf_view import ElfView
from pyqmigrate.format.address_space.placement import GivenPlacement
from pyqmigrate.integrations.opened import open_any, view_of
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["main", "program"]

# By their numbers in ELF files.
_ARCHITECTURES = {
    21: drgn.Architecture.PPC64,
    22: drgn.Architecture.S390X,
    62: drgn.Architecture.X86_64,
    183: drgn.Architecture.AARCH64,
    243: drgn.Architecture.RISCV64,
}


def program(
    snapshot: Snapshot | str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    placements: Sequence[GivenPlacement] | None = None,
    max_ram_below_4g: int | None = None,
    vmcoreinfo: bytes | None = None,
) -> drgn.Program:
    """Return the guest of a snapshot as a drgn program. No debugging symbols are loaded.

    snapshot: an open snapshot, which stays open and must outlive the program; or what
        :func:`pyqmigrate.open_snapshot` opens, which is closed along with the program.
    base: as in :func:`pyqmigrate.open_snapshot`, for a path.
    placements, max_ram_below_4g: as in :func:`pyqmigrate.convert`.
    vmcoreinfo: the text of a Linux guest's VMCOREINFO. None searches the memory for it, which takes
        as long as reading the memory up to it. A guest without one is not a Linux for drgn: the
        program has its physical memory only, and no registers.

    Raises the errors of :func:`pyqmigrate.open_snapshot` and :func:`pyqmigrate.convert`, and the
    errors of :meth:`drgn.Program.set_core_dump`.
    """
    is_open = isinstance(snapshot, Snapshot)
    opened = snapshot if isinstance(snapshot, Snapshot) else open_any(snapshot, base=base)
    try:
        view = view_of(
            opened,
            placements=placements,
            max_ram_below_4g=max_ram_below_4g,
            vmcoreinfo=b"" if vmcoreinfo is not None else None,
        )
        prog = _program(view, vmcoreinfo)
    except BaseException:
        if not is_open:
            opened.close()
        raise
    if not is_open:
        weakref.finalize(view, opened.close)  # the program has the only references to the view
    return prog


def _program(view: ElfView, vmcoreinfo: bytes | None) -> drgn.Program:
    if vmcoreinfo is None and not view.vmcoreinfo:
        # drgn refuses the core of a guest that is not a Linux, and has no other way to take registers.
        prog = drgn.Program(_platform(view.layout))
        _add_memory(prog, view)
        return prog
    prog = drgn.Program(vmcoreinfo=vmcoreinfo)
    fd = os.memfd_create("snapshot.elf")
    try:
        with open(fd, "wb", closefd=False) as head:
            head.write(view.head)
        # By a path: drgn opens a descriptor of its own. One that it is given it closes, if it fails.
        prog.set_core_dump(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    _add_memory(prog, view)  # hides the segments of the core, whose bytes the memfd does not have
    return prog


def _platform(layout: ElfLayout) -> drgn.Platform:
    flags = drgn.PlatformFlags.IS_64_BIT
    if not layout.big_endian:
        flags |= drgn.PlatformFlags.IS_LITTLE_ENDIAN
    return drgn.Platform(_ARCHITECTURES.get(layout.machine, drgn.Architecture.UNKNOWN), flags)


def _add_memory(prog: drgn.Program, view: ElfView) -> None:
    for segment in view.layout.segments:
        prog.add_memory_segment(
            segment.address, segment.length, partial(_read, view, segment.position), True
        )


def _read(
    view: ElfView, position: int, address: int, length: int, offset: int, physical: bool
) -> bytes:
    """Read for drgn; a fault of the snapshot is one of the program's memory."""
    try:
        return view.read(position + offset, length)
    except PyqmigrateError as error:
        raise drgn.FaultError(str(error), address) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run drgn on a snapshot: a script, a statement, or its interactive mode. Return the exit status."""
    args = _parser().parse_intermixed_args(arguments)
    try:
        prog = program(args.snapshot, base=args.base)
    except (PyqmigrateError, ValueError) as error:  # ValueError: drgn cannot use the core
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.symbols:
        try:
            prog.load_debug_info(args.symbols)
        except drgn.MissingDebugInfoError as error:  # of modules, for example
            print(f"warning: {error}", file=sys.stderr)
    if not args.script and args.execute is None:
        drgn.cli.run_interactive(prog)
        return 0
    drgn.set_default_prog(prog)
    try:
        if args.execute is not None:
            exec(args.execute, drgn.cli.default_globals(prog))
        else:
            sys.argv = args.script
            sys.path.insert(0, os.path.dirname(os.path.abspath(args.script[0])))
            runpy.run_path(args.script[0], init_globals={"prog": prog}, run_name="__main__")
    finally:
        drgn.set_default_prog(None)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pyqmigrate.integrations.drgn",
        description="drgn on a snapshot of any kind: interactively, or with a script.",
    )
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="a file, or STORE#NAME")
    parser.add_argument("--base", metavar="PATH", help="the base of an increment")
    parser.add_argument(
        "-s",
        "--symbols",
        metavar="PATH",
        action="append",
        help="load debugging symbols from this file, such as a vmlinux; can be given several times",
    )
    parser.add_argument("-e", "--execute", metavar="CODE", help="run this statement")
    parser.add_argument(
        "script",
        metavar="SCRIPT ARG",
        nargs="*",
        help="run this program with these arguments; -- before an argument that begins with -",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
