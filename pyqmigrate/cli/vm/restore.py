"""Start a QEMU that goes on where a snapshot was taken.

After ``--`` comes the command line that the VM was started with; without it, the one that vm save
recorded in SNAPSHOT.vm.json is used. What a restore needs is added. Processors, devices and memory
are compared with the record and the snapshot. What cannot work is refused before anything is loaded,
and so are sockets and writable disks that another process uses, such as the saved guest, and disks
that have changed since the snapshot. --with-disks runs the guest on new overlays,
SNAPSHOT.DISK.qcow2, over the disks as they were.

In mode instant the guest's memory is mapped from the snapshot, and the guest runs after milliseconds
whatever its size; the file must not change in place while the guest runs, but may be replaced or
removed. In mode load QEMU reads the whole file first; postcopy is QEMU's own lazy load, if it has
one. The default, auto, is instant if possible, else lazy if possible, else load.

In mode lazy the guest runs after milliseconds, too, whatever the form of the snapshot and the kind of its
memory (shared, memfd, tmpfs file, huge pages): a page server sends the pages to QEMU over a post-copy
migration, first those that the guest asks for and those of --working-set. It is a process of its own, goes
on when this command is killed, and is restarted when it dies itself. A page that cannot be read, or is not
as it was sealed, is never sent: the guest waits when it touches it, and the page is named on standard error.
"vm wait" waits until the guest has all of its memory, or goes on from a good copy. QEMU's user needs access
to /dev/userfaultfd, or vm.unprivileged_userfaultfd must be 1.

If SNAPSHOT is an increment, the guest's memory is mapped from its base, and the changed pages are
loaded over it. The base must be the file that the increment was made from; --base names it if it was
moved. In mode load the two are merged and streamed to QEMU.

QEMU inherits this command's standard streams and every other open descriptor (-add-fd fd=5, -netdev
tap,fd=5). The command waits until QEMU ends, and forwards SIGINT, SIGTERM and SIGHUP to it; before
the restore is complete they end it. The report is printed on standard error when the guest is
restored.

A saved guest's clocks stop, so its wall clock falls behind. ``--set-time`` sets it by the guest
agent, whose socket is found in the command line; otherwise a note says how.

SNAPSHOT may be a snapshot of a store, STORE#NAME: the guest runs from a private mount of it, and what goes
wrong with the store while it runs is printed on standard error. --with-disks needs --disks-dir then, and
--record writes into the store.

With --record (modes instant and lazy) the pages that the guest touches within SECONDS are recorded into
SNAPSHOT.workingset, in the order of first touch. The recording ends earlier if QEMU ends, by a signal
for instance; what was seen until then is written. In mode lazy nothing is sent within that time but what
the guest asks for, and the file, that of --working-set if given, is written when the guest has all of its
memory. Later instant restores of the snapshot read these
pages ahead while QEMU starts, which helps if the snapshot is not in the page cache. A recorded
working set that is damaged, or of another snapshot, is not used; a note says so.

The exit code is 0 if QEMU ended with 0, and 4 otherwise.

JSON, printed as soon as the guest is restored: ``mode``; ``why``; ``machine``; ``qemu``, its
version; ``pid``; ``run_state``; ``load_seconds``, from migrate-incoming to completed;
``start_seconds`` until QEMU answered; ``total_seconds``; ``settings`` of QEMU that are not its
defaults, each an object of ``value``; ``mapped_blocks``; ``stale_pages`` for which the file had old
bytes, and ``stale_seconds`` to find them; ``recorded_pages`` of the recorded working set, and
``prefetched_bytes``, how much of it was requested until then; ``lazy``, null or how far a lazy restore was,
as vm wait prints it; ``notes``. If QEMU fails later, standard
error and the exit code report it.
"""

from __future__ import annotations

import argparse
import contextlib
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
from pyqmigrate.cli.vm.lazy import add_lazy, working_set_of
from pyqmigrate.io.direct_io import DirectIO

if TYPE_CHECKING:
    import asyncio

    from pyqmigrate.vm.incoming.early_restore import EarlyRestore
    from pyqmigrate.vm.incoming.options import DiskOptions, RestoreOptions
    from pyqmigrate.vm.incoming.recording import WorkingSetReport
    from pyqmigrate.vm.incoming.report import RestoredVm, RestoreReport

__all__ = [
    "add_base",
    "add_cache",
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
    add_base(parser)
    parser.add_argument(
        "--mode",
        choices=["auto", "instant", "lazy", "load", "postcopy"],
        default="auto",
        help="how guest memory is restored (default: auto)",
    )
    add_run_state(parser)
    parser.add_argument("--qmp", metavar="SOCKET", help="add a monitor to QEMU: PATH or unix:PATH")
    add_clock(parser)
    add_offset(parser)
    parser.add_argument(
        "--channels",
        type=read_channels,
        metavar="N",
        default=None,
        help="number of channels that QEMU reads with in mode load (default: chosen for the file)",
    )
    add_direct_io(parser)
    add_disks(parser, "beside the snapshot")
    parser.add_argument(
        "--record",
        type=_read_seconds,
        metavar="SECONDS",
        help="record which pages the guest touches within this time, for later restores to read ahead",
    )
    add_lazy(parser)
    add_cache(parser)
    add_command(parser)


def _read_seconds(text: str) -> float:
    from pyqmigrate.errors import UsageError
    from pyqmigrate.vm.incoming.options import check_record

    try:
        return check_record(float(text))
    except (ValueError, UsageError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="where the base of an increment is (default: the place that the increment records)",
    )


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="where packs of a remote store are kept (default: ~/.cache/pyqmigrate/packs)",
    )


def add_run_state(parser: argparse.ArgumentParser) -> None:
    state = parser.add_mutually_exclusive_group()
    state.add_argument(
        "--paused",
        dest="paused",
        action="store_true",
        default=None,
        help="leave the guest paused (default: with -S, or if it was saved paused)",
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
        "--disks-dir", metavar="DIR", help=f"directory of the overlays (default: {where})"
    )
    parser.add_argument(
        "--disks-as-they-are",
        action="store_true",
        help="restore even if disks have changed since the snapshot or are not the recorded ones",
    )


def _disk_options(args: argparse.Namespace) -> DiskOptions:
    from pyqmigrate.vm.incoming.options import DiskOptions

    directory = None if args.disks_dir is None else Path(args.disks_dir)
    return DiskOptions(args.with_disks, directory, args.disks_as_they_are)


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
    with contextlib.nullcontext() if args.mode == "lazy" else _prepared_mount(args.snapshot):
        return _run_restore(args)


def _prepared_mount(snapshot: str) -> contextlib.AbstractContextManager[object]:
    """Start the keeper of a snapshot of a store, so that it imports what it needs at the same time as
    this process."""
    if "#" not in snapshot:
        return contextlib.nullcontext()
    from pyqmigrate.errors import TargetError
    from pyqmigrate.io.view import names_stored

    if not names_stored(snapshot):
        return contextlib.nullcontext()
    from pyqmigrate.mount.private import prepare_private

    try:
        return prepare_private(snapshot.rpartition("#")[0])
    except TargetError:  # the restore meets it again
        return contextlib.nullcontext()


def _run_restore(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.cli.interruption import held_signals, run_interruptible
    from pyqmigrate.vm.incoming.early_start import start_early
    from pyqmigrate.vm.incoming.inherited_fds import inherited_descriptors
    from pyqmigrate.vm.incoming.options import Mode, Push, RestoreOptions

    qmp = None
    if args.qmp is not None:
        from pyqmigrate.qapi.monitor_address import monitor_path

        qmp = monitor_path(args.qmp)
    options = RestoreOptions(
        mode=Mode(args.mode),
        paused=args.paused,
        offset=args.offset,
        qmp=qmp,
        channels=args.channels,
        direct_io=DirectIO(args.direct_io),
        pass_fds=inherited_descriptors(),
        disks=_disk_options(args),
        set_time=args.set_time,
        guest_agent=args.guest_agent,
        record=args.record,
        base=args.base,
        cache=None if args.cache is None else Path(args.cache).absolute(),
        working_set=working_set_of(args),
        push=Push(args.push),
        huge_pages=args.huge_pages,
    )
    if options.mode not in (Mode.AUTO, Mode.INSTANT, Mode.LAZY):
        return run_interruptible(_restore(args, options, None))
    with held_signals() as held:
        start = start_early(args.snapshot, args.command or None, options)
        if start is not None:
            held.react = start.signal
            for number in tuple(held.received):
                start.signal(number)
        elif held.received:
            raise KeyboardInterrupt
        early = None if start is None else start.result()
        try:
            forward = None if early is None else early.signal_guest
            return run_interruptible(_restore(args, options, early), held, forward)
        except KeyboardInterrupt:
            if early is not None:  # the event loop had not taken it over yet
                early.end()
            raise


async def _restore(
    args: argparse.Namespace, options: RestoreOptions, early: EarlyRestore | None
) -> Outcome:
    from pyqmigrate.cli.vm.lazy import lazy_shown
    from pyqmigrate.cli.vm.store_messages import store_messages_shown
    from pyqmigrate.vm.incoming.restore import finish_restore, restore_checked

    if early is not None:
        vm = await finish_restore(early)
    else:
        vm = await restore_checked(args.snapshot, args.command or None, options)
    pass_signals_on([vm])  # from here on signals end this command only through QEMU
    async with vm:
        announce(args, vm.report.to_json(), report_lines(vm.report))
        if vm.recording is not None:
            vm.recording.add_done_callback(_print_recording)
        async with store_messages_shown([vm]), lazy_shown([vm]):
            code = await vm.wait()
    if not code:
        return ended()
    return ended(f"QEMU was killed by signal {-code}" if code < 0 else f"QEMU ended with {code}")


def _print_recording(result: asyncio.Future[WorkingSetReport]) -> None:
    """Print what a recording gave, or why it failed, on standard error."""
    error = result.exception()
    if error is None:
        report = result.result()
        text = (
            f"recorded {counted(report.pages, 'page')} in {report.seconds:.1f} s: "
            f"{printable(str(report.path))}"
        )
    else:
        text = f"no working set is recorded: {printable(str(error))}"
    print(f"pyqmigrate: {text}", file=sys.stderr, flush=True)


def ended(problem: str = "") -> Outcome:
    """Return the outcome of a command that has printed its report already."""
    if problem:
        print(f"pyqmigrate: {problem}", file=sys.stderr, flush=True)
    return Outcome(None, [], ExitCode.GUEST if problem else ExitCode.DONE)


def pass_signals_on(vms: list[RestoredVm]) -> None:
    """Forward signals that would end this command to QEMU from now on."""
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
    """Return the report as text."""
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
    if report.recorded_pages:
        lines.append(
            f"prefetch  {counted(report.recorded_pages, 'page')} recorded, "
            f"{report.prefetched_bytes / (1 << 20):.0f} MiB read ahead so far"
        )
    if report.lazy is not None and report.lazy.pages_left is not None:
        lines.append(f"lazy      {counted(report.lazy.pages_left, 'page')} to come")
    return lines + [f"note      {printable(note)}" for note in report.notes]


def _aligned(text: str) -> str:
    """Return printable text, with QEMU's lines aligned below each other."""
    return "\n          ".join(printable(line) for line in text.split("\n"))
