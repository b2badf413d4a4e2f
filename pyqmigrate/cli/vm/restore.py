"""Start a QEMU that goes on where a snapshot was taken.

After ``--`` comes the command line that the VM was started with; without it, the one that vm save
recorded in SNAPSHOT.vm.json is used. What a restore needs is added. Its processors, devices and
memory are compared with the record and the snapshot; what cannot work is refused before anything is
loaded, and so are sockets and writable disks that another process uses, such as the guest that was
saved, and disks that have gone ahead of the snapshot. --with-disks runs the guest on new overlays,
SNAPSHOT.DISK.qcow2, over the disks as they were.

In mode instant the guest's memory is mapped from the snapshot, and the guest is there in
milliseconds whatever its size; the file must not change in place while the guest runs, and may be
replaced or removed. In mode load QEMU reads all of it first; postcopy is QEMU's own lazy load,
where it has one. The default, auto, is instant where that is possible.

QEMU has this command's standard streams and every other descriptor that was open when it was
started (-add-fd fd=5, -netdev tap,fd=5). The command waits until it ends, and passes SIGINT,
SIGTERM and SIGHUP on to it; before the guest is there, they end the restore, and the guest has not
run. What was done is printed on standard error when the guest is there.

While a guest is a file its clocks stand still, so its wall clock falls behind. ``--set-time`` sets
it by the guest agent, whose socket is found in the command line; otherwise a note says how.

The exit code is 0 when QEMU ended with 0, and 4 otherwise.

JSON, printed as soon as the guest is there: ``mode``; ``why``; ``machine``; ``qemu``, its version;
``pid``; ``run_state``; ``load_seconds``, from migrate-incoming to completed; ``start_seconds``
until QEMU answered; ``total_seconds``; ``settings`` of QEMU that are not its defaults, each an
object of ``value``; ``mapped_blocks``; ``stale_pages`` that the file had old bytes for, and
``stale_seconds`` to find them; ``notes``. That QEMU ended badly later is reported on standard error
and the exit code.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pyqmigrate.cli.arguments import (
    Parser,
    Verbs,
    add_clock,
    add_direct_io,
    add_offset,
    add_verb,
    read_channels,
)
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.outcome import Outcome, announce, counted, printable
from pyqmigrate.io.target import DirectIO

if TYPE_CHECKING:
    from pyqmigrate.vm.incoming.early_start import EarlyRestore
    from pyqmigrate.vm.incoming.request import Disks, Request
    from pyqmigrate.vm.incoming.restore import RestoredVm, RestoreReport

__all__ = [
    "add_command",
    "add_disks",
    "add_parser",
    "add_run_state",
    "ended",
    "pass_signals_on",
    "report_lines",
]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "restore", _run, __doc__)
    parser.add_argument("snapshot", metavar="SNAPSHOT")
    parser.add_argument(
        "--mode",
        choices=["auto", "instant", "load", "postcopy"],
        default="auto",
        help="how the memory gets there (default: auto)",
    )
    add_run_state(parser)
    parser.add_argument(
        "--qmp", metavar="SOCKET", help="give QEMU one more monitor, here: PATH or unix:PATH"
    )
    add_clock(parser)
    add_offset(parser)
    parser.add_argument(
        "--channels",
        type=read_channels,
        metavar="N",
        default=None,
        help="how many channels QEMU reads with in mode load (default: as the file needs)",
    )
    add_direct_io(parser)
    add_disks(parser, "beside the snapshot")
    add_command(parser)


def add_run_state(parser: argparse.ArgumentParser) -> None:
    state = parser.add_mutually_exclusive_group()
    state.add_argument(
        "--paused",
        dest="paused",
        action="store_true",
        default=None,
        help="leave the guest paused (default: with -S, or as it was saved)",
    )
    state.add_argument(
        "--running",
        dest="paused",
        action="store_false",
        default=None,
        help="let the guest run even if it was saved paused",
    )


def add_disks(parser: argparse.ArgumentParser, where: str) -> None:
    parser.add_argument(
        "--with-disks",
        action="store_true",
        help="run on new overlays over the disks as they were at the snapshot's instant",
    )
    parser.add_argument(
        "--disks-dir", metavar="DIR", help=f"where the overlays are made (default: {where})"
    )
    parser.add_argument(
        "--disks-as-they-are",
        action="store_true",
        help="restore also where disks have gone ahead of the snapshot, or are others",
    )


def read_disks(args: argparse.Namespace) -> Disks:
    from pyqmigrate.vm.incoming.request import Disks

    directory = None if args.disks_dir is None else Path(args.disks_dir)
    return Disks(args.with_disks, directory, args.disks_as_they_are)


def add_command(parser: Parser) -> None:
    parser.add_argument(
        "command",
        nargs="*",
        metavar="-- qemu-system-... ARGS",
        help="the command line that the VM was started with (default: the one that vm save "
        "recorded)",
    )
    parser.takes_command_line = True


def _run(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.vm.incoming.early_start import begin
    from pyqmigrate.vm.incoming.inherited_fds import inherited_descriptors
    from pyqmigrate.vm.incoming.request import Mode, Request

    qmp = None
    if args.qmp is not None:
        from pyqmigrate.qapi.monitor_address import monitor_path

        qmp = monitor_path(args.qmp)
    request = Request(
        Mode(args.mode),
        args.paused,
        qmp,
        args.channels,
        DirectIO(args.direct_io),
        pass_fds=inherited_descriptors(),
        disks=read_disks(args),
        set_time=args.set_time,
        guest_agent=args.guest_agent,
    )
    early = None
    if request.mode in (Mode.AUTO, Mode.INSTANT):
        early = begin(args.snapshot, args.command or None, request, offset=args.offset)
    try:
        # What takes long to import comes when QEMU is starting.
        from pyqmigrate.cli.interruption import run_interruptible

        return run_interruptible(_restore(args, request, early))
    except KeyboardInterrupt:
        if early is not None:  # where it came before the loop had it
            early.end()
        raise


async def _restore(
    args: argparse.Namespace, request: Request, early: EarlyRestore | None
) -> Outcome:
    from pyqmigrate.vm.incoming.restore import finish_restore, restore

    if early is not None:
        vm = await finish_restore(early)
    else:
        vm = await restore(
            args.snapshot,
            args.command or None,
            mode=request.mode,
            paused=request.paused,
            qmp=request.qmp,
            offset=args.offset,
            channels=request.channels,
            direct_io=request.direct_io,
            pass_fds=request.pass_fds,
            with_disks=args.with_disks,
            disks_dir=args.disks_dir,
            disks_as_they_are=args.disks_as_they_are,
            set_time=request.set_time,
            guest_agent=request.guest_agent,
        )
    pass_signals_on([vm])  # from here on no signal ends this command but through QEMU
    async with vm:
        announce(args, vm.report.to_json(), report_lines(vm.report))
        code = await vm.wait()
    if not code:
        return ended()
    return ended(f"QEMU was killed by signal {-code}" if code < 0 else f"QEMU ended with {code}")


def ended(trouble: str = "") -> Outcome:
    """How it came out, for a command that has printed its report long ago."""
    if trouble:
        print(f"pyqmigrate: {trouble}", file=sys.stderr, flush=True)
    return Outcome(None, [], ExitCode.GUEST if trouble else ExitCode.DONE)


def pass_signals_on(vms: list[RestoredVm]) -> None:
    """From now on the signals that end this command go to QEMU instead."""
    import asyncio

    from pyqmigrate.cli.interruption import ending_signals

    loop = asyncio.get_running_loop()

    def send(number: int) -> None:
        for vm in vms:
            if vm.process.poll() is None:
                vm.process.send_signal(number)

    for number in ending_signals():
        loop.add_signal_handler(number, send, number)


def report_lines(report: RestoreReport) -> list[str]:
    """For people."""
    lines = [
        f"restored  {report.mode}: {_aligned(report.why)}",
        f"guest     {report.run_state}, pid {report.pid}, {printable(report.machine)}, "
        f"QEMU {report.qemu}",
        f"time      {report.load_seconds * 1000:.1f} ms to load, "
        f"{report.total_seconds * 1000:.0f} ms in all",
    ]
    if report.stale_pages:
        lines.append(
            f"stale     {counted(report.stale_pages, 'page')} marked, found in "
            f"{report.stale_seconds * 1000:.0f} ms"
        )
    return lines + [f"note      {printable(note)}" for note in report.notes]


def _aligned(text: str) -> str:
    """Safe to print; what QEMU wrote stays in its lines, below each other."""
    return "\n          ".join(printable(line) for line in text.split("\n"))
