"""Report what a save of a running guest would do, without saving it; or whether a snapshot can be restored
here.

Queries QEMU, inspects its memory, and with --dir measures the disk by writing 64 MiB to an unnamed
file. The exit code is 1 if the guest cannot be saved or the file would not fit. The report is about
a save with the same --engine and --sparse, the same options of live saves, and no other options.
Each live method is listed with its expected pause, or the reasons against it.

With --for-restore SNAPSHOT no guest is needed, and none is started: the CPU features that the snapshot's
guest uses are compared with this host and with the QEMU, the accelerator and the CPU model of the command
line after ``--``, by default of the one that vm save recorded; a given command line also with the recorded
VM. The exit code is 1 if something is missing. It is for x86. The JSON has only ``snapshot`` and ``host``
then, an object as that of "info --host".

JSON: ``possible``; ``qemu`` (its version); ``pid`` (or null); ``machine``; ``run_state``;
``total_ram``; ``engine`` and ``way`` (null if there is none), ``why`` and ``refused`` (reasons
against engine direct); ``settings`` (QEMU's, which the save would change temporarily: each with
``value`` and ``why``); ``method`` (that a live save would try first, or null), ``method_why`` and
``instant`` (start or end: of the save, whose state the file would hold); ``methods``, a list of
``method``, ``possible``, ``expected_pause`` (seconds, or null), ``basis`` (a sentence on that),
``reasons`` (against it) and ``instant``; ``blockers``, ``warnings`` and ``notes`` (sentences); ``data`` (bytes of pages
that are not zero), ``basis`` (counted; sampled; or bound: an upper bound, since not all memory can be
read) and ``need`` (maximum size of the file on disk, including zero pages that are written along; a
live save needs more if the guest fills pages during the save); ``directory``, ``free``, ``fits``,
``direct_io``, ``direct_io_reason``, ``rate`` (bytes a second) and ``seconds`` (null without --dir,
``free`` and ``fits`` also if there is no limit); ``blocks``, a list of ``name``, ``length``, ``kind``
(file, process, or null: cannot be read), ``shared``, ``file_backed``, ``why_not``; ``disks``, a list
of ``device``, ``qdev``, ``node``, ``file``, ``format``, ``writable``, ``size`` and ``chain``, the
backing files (``file``, ``format``, ``size``); ``disk_needs`` (sentences); ``with_disks`` (whether
--with-disks is possible, null if no disk is writable) and ``why_no_disks``; ``can_be_lazy`` (whether a restore
with this command line, on this host, can be in mode lazy) and ``why_not_lazy``. Sizes are in bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.host import host_data, host_lines
from pyqmigrate.cli.interruption import run_interruptible
from pyqmigrate.cli.outcome import Outcome, printable, table
from pyqmigrate.cli.sizes import show_rate, show_size
from pyqmigrate.cli.vm.live import add_live, live_options
from pyqmigrate.cli.vm.restore import add_command
from pyqmigrate.cli.vm.settings import setting_lines
from pyqmigrate.errors import UsageError
from pyqmigrate.io.memory import FileMemory
from pyqmigrate.snapshot.save.writer import Sparse

if TYPE_CHECKING:
    from pyqmigrate.vm.guest.inspect import GuestBlock
    from pyqmigrate.vm.plan.check import CheckReport
    from pyqmigrate.vm.plan.live_option import LiveOption

__all__ = ["add_parser"]

_ABOUT = {"counted": "", "sampled": "about ", "bound": "at most "}


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "check", _run, __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--qmp", metavar="SOCKET", help="QEMU's QMP socket: PATH or unix:PATH")
    what.add_argument(
        "--for-restore",
        metavar="SNAPSHOT",
        help="compare the CPU features that this snapshot's guest uses with what a restore would give it",
    )
    parser.add_argument("--dir", metavar="DIR", help="the snapshot's directory; measures its disk")
    parser.add_argument(
        "--engine",
        choices=["auto", "qemu", "direct"],
        default="auto",
        help="who writes the pages (default: auto)",
    )
    add_live(parser)
    parser.add_argument(
        "--sparse",
        choices=[str(policy) for policy in Sparse],
        default="auto",
        help="how zero pages are stored (default: auto, whichever is fast)",
    )
    add_command(parser)
    parser.command_line_option = "--for-restore"


def _run(args: argparse.Namespace) -> Outcome:
    if args.for_restore is not None:
        return _for_restore(args)
    report = run_interruptible(_check(args))
    data = _data(report)
    code = ExitCode.DONE if report.possible else ExitCode.BAD
    return Outcome(data, [printable(line) for line in _lines(report, data)], code)


def _for_restore(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.snapshot.detect import open_snapshot
    from pyqmigrate.vm.incoming.portability import check_host
    from pyqmigrate.vm.incoming.restore_cpu import restore_cpu

    if args.dir is not None:
        raise UsageError("--dir is for the check of a save: leave out --for-restore")
    base = None if args.base in ("auto", "none") else args.base
    with open_snapshot(args.for_restore, base=base) as snapshot:
        cpu = restore_cpu(snapshot, args.command or None)
        found = check_host(snapshot, qemu=cpu.qemu, accelerator=cpu.accelerator, model=cpu.model)
    report = replace(
        found, obstacles=(*found.obstacles, *cpu.faults), notes=(*found.notes, *cpu.notes)
    )
    return Outcome(
        {"snapshot": args.for_restore, "host": host_data(report)},
        [*host_lines(report)],
        ExitCode.DONE if report.possible else ExitCode.BAD,
    )


async def _check(args: argparse.Namespace) -> CheckReport:
    # qemu.qmp is optional: other verbs work without it.
    from pyqmigrate.vm.plan.check import check
    from pyqmigrate.vm.qemu.monitor import Monitor

    async with await Monitor.connect(args.qmp) as monitor:
        return await check(
            monitor, args.dir, engine=args.engine, sparse=args.sparse, **live_options(args)
        )


def _data(report: CheckReport) -> dict[str, Any]:
    choice, disk = report.choice, report.disk
    return {
        "possible": report.possible,
        "qemu": ".".join(map(str, report.version)),
        "pid": report.pid,
        "machine": report.machine,
        "run_state": report.run_state,
        "total_ram": report.total_ram,
        "engine": None if choice is None else str(choice.engine),
        "way": None if choice is None or choice.way is None else str(choice.way),
        "why": "" if choice is None else choice.why,
        "refused": [] if choice is None else list(choice.refused),
        "method": None if report.live is None else str(report.live.method),
        "method_why": "" if report.live is None else report.live.why,
        "instant": "start" if report.live is None else str(report.live.instant),
        "methods": [_method(option) for option in report.methods],
        "blockers": list(report.blockers),
        "warnings": list(report.warnings),
        "notes": list(report.notes),
        "settings": {name: asdict(used) for name, used in report.settings.items()},
        "data": report.estimate.data,
        "basis": str(report.estimate.basis),
        "need": report.need,
        "directory": None if report.directory is None else str(report.directory),
        "free": None if disk is None else disk.free,
        "fits": report.fits,
        "direct_io": None if disk is None else disk.direct_io,
        "direct_io_reason": None if disk is None else disk.reason,
        "rate": None if disk is None else round(disk.rate),
        "seconds": report.seconds,
        "blocks": [_block(block) for block in report.blocks],
        "disks": [asdict(disk) for disk in report.disks],
        "disk_needs": list(report.disk_needs),
        "with_disks": report.disks_along,
        "why_no_disks": report.why_no_disks,
        "can_be_lazy": not report.why_not_lazy,
        "why_not_lazy": report.why_not_lazy,
    }


def _method(option: LiveOption) -> dict[str, Any]:
    return {
        "method": str(option.method),
        "possible": option.possible,
        "expected_pause": option.expected_pause,
        "basis": option.basis,
        "reasons": list(option.reasons),
        "instant": str(option.method.instant),
    }


def _block(block: GuestBlock) -> dict[str, Any]:
    kind = "file" if isinstance(block.memory, FileMemory) else "process"
    return {
        "name": block.name,
        "length": block.length,
        "kind": None if block.memory is None else kind,
        "shared": block.shared,
        "file_backed": block.file_backed,
        "why_not": block.why_not,
    }


def _lines(report: CheckReport, data: dict[str, Any]) -> Iterator[str]:
    process = "" if report.pid is None else f", process {report.pid}"
    yield f"QEMU      {data['qemu']}{process}"
    yield f"machine   {report.machine}, {report.run_state}"
    if report.choice is None:
        yield "engine    none: this guest cannot be saved now"
    else:
        yield f"engine    {report.choice.engine}: {report.choice.why}"
        yield from (f"          not direct: {reason}" for reason in report.choice.refused)
    if report.live is not None:
        yield f"method    {report.live.method}: {report.live.why}"
    yield from (_method_line(option) for option in report.methods)
    about = _ABOUT[report.estimate.basis]
    yield (
        f"RAM       {show_size(report.total_ram)}, {about}{show_size(report.estimate.data)} of it "
        "not zero"
    )
    yield from _disk_lines(report)
    yield from setting_lines(report.settings)
    yield from (f"note      {sentence}" for sentence in report.notes)
    yield from (f"blocker   {sentence}" for sentence in report.blockers)
    yield from (f"warning   {sentence}" for sentence in report.warnings)
    yield from (f"restore   {sentence}" for sentence in report.disk_needs)
    if report.disks_along is not None:
        possible = "possible" if report.disks_along else f"impossible: {report.why_no_disks}"
        yield f"disks     --with-disks is {possible}"
    possible = f"impossible: {report.why_not_lazy}" if report.why_not_lazy else "possible here"
    yield f"restore   --mode lazy is {possible}"
    yield ""
    yield from table(
        ("block", "length", "read from"),
        [(b["name"], show_size(b["length"]), b["kind"] or "nowhere") for b in data["blocks"]],
    )


def _method_line(option: LiveOption) -> str:
    if not option.possible:
        return f"live      not {option.method}: {'; '.join(option.reasons)}"
    if option.expected_pause is None:
        return f"live      {option.method}: how long it pauses the guest is not known"
    return f"live      {option.method}: a pause of about {option.expected_pause * 1e3:.0f} ms"


def _disk_lines(report: CheckReport) -> Iterator[str]:
    yield f"file      at most {show_size(report.need)} of disk"
    disk = report.disk
    if disk is None:
        return
    room = "no limit" if disk.free is None else f"{show_size(disk.free)} free"
    yield f"space     {room}" + (": not enough" if report.fits is False else "")
    direct = "direct I/O" if disk.direct_io else f"no direct I/O ({disk.reason})"
    yield f"disk      {direct}"
    if report.seconds is not None:
        yield f"time      about {report.seconds:.1f} s at {show_rate(round(disk.rate), 1)} MiB/s"
