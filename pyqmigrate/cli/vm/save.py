"""Save the guest of a running QEMU, and leave it as it was found.

SNAPSHOT appears when it is complete, durable and verified. SNAPSHOT.vm.json beside it describes the
VM for vm restore. If anything fails, or this command is interrupted or killed, the guest is restored
as it was, running or paused, with its settings.

With engine qemu QEMU writes the file, with settings that are fast for this guest; with engine direct
QEMU writes only its device state and this command the pages. Without --then the guest is left as it
was found; --then quit ends QEMU once the snapshot has its name, and waits for that. --set-time sets
the clock of a guest that goes on, by its agent: the pause has put it behind. --seal writes
SNAPSHOT.seal too (see the verb seal); with engine qemu the file is read for it.

With --live the guest runs during the save, and is stopped for milliseconds only. There are four
methods (--method): QEMU converges, or write-protects the memory (background); this command copies
pages and compares them in the pause (precopy), or copies only those that changed since the guest was
restored (changed). A save that cannot keep --max-pause lets the guest go on and fails. --base writes
an increment: the changed pages, and the device state; it is restored together with its base. vm check
predicts the methods and their pauses. Without --live, engine direct saves a running guest with at
least 1 GiB of data by precopy, if the guest goes on afterwards.

A guest whose memory is not a shared file is saved by QEMU's xen-save-devices-state, which does not
describe device state. With --describe auto, the default, a second QEMU of the same machine, which
never runs, describes it while the guest goes on; a note says if that is not possible.

JSON: ``snapshot``; ``engine`` and ``why``; ``settings``, an object of QEMU's settings that were
changed temporarily, each with ``value`` and ``why``; ``direct_io``, ``direct_io_reason``;
``channels``; ``downtime`` (seconds; null if the guest did not run before, or does not now);
``seconds``; ``bytes_written``, ``bytes_allocated``, ``file_size``; ``rate`` (bytes a second);
``run_state_before``, ``run_state_after`` (null: QEMU was told to quit); ``disk_needs`` (sentences
on what a restore needs of the writable disks); ``record`` (the file that describes the VM, or null);
``seal`` (null, or an object of ``path`` and ``algorithm``); ``method`` (that of a live save, or
null) and ``method_why``; ``instant`` (start or end: of the save, whose state the file holds);
``rounds`` (passes of a live save over the memory, or null), ``slowdown`` (the share of the
processor time of its CPUs that the guest lost during the save; null if not known); ``base`` (the
snapshot that an increment belongs to, or null) and ``changed_pages`` (null without one);
``timeline`` (what happened when: a list of objects with ``lane``, which is guest, qemu, pages, file or
channel N, ``name``, ``begins`` and ``ends`` in seconds since the save began, and ``pages``, how many pages a
channel went through, or null); ``timeline_picture`` (the path of the picture, or null); ``notes`` (sentences).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pyqmigrate.cli.arguments import (
    Verbs,
    add_channels,
    add_clock,
    add_direct_io,
    add_seal,
    add_verb,
)
from pyqmigrate.cli.interruption import run_interruptible
from pyqmigrate.cli.outcome import Outcome, counted, printable, seal_data
from pyqmigrate.cli.picture_file import check_picture_place, write_picture
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import show_rate, show_size
from pyqmigrate.cli.standard_streams import refuse_standard
from pyqmigrate.cli.vm.live import add_live, live_options
from pyqmigrate.cli.vm.settings import setting_lines
from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.io.place import seal_path
from pyqmigrate.snapshot.save.writer import Sparse

if TYPE_CHECKING:
    from pyqmigrate.vm.outgoing.report import VmSaveReport

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "save", _run, __doc__)
    parser.add_argument(
        "--qmp", metavar="SOCKET", required=True, help="QEMU's QMP socket: PATH or unix:PATH"
    )
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="the snapshot to write")
    parser.add_argument(
        "--engine",
        choices=["auto", "qemu", "direct"],
        default="auto",
        help="who writes the pages (default: auto, direct unless that would miss something)",
    )
    add_live(parser)
    parser.add_argument(
        "--then",
        choices=["pause", "resume", "quit"],
        default=None,
        help="what to do with the guest afterwards (default: leave it as it was)",
    )
    add_clock(parser)
    add_channels(parser)
    add_direct_io(parser)
    parser.add_argument(
        "--sparse",
        choices=[str(policy) for policy in Sparse],
        default="auto",
        help="how zero pages are stored (default: auto, whichever is fast)",
    )
    parser.add_argument(
        "--with-disks",
        action="store_true",
        help="take snapshots of the writable disks at the same instant",
    )
    add_seal(parser)
    parser.add_argument(
        "--describe",
        choices=["auto", "no"],
        default="auto",
        help="describe device state that QEMU does not describe (default: auto)",
    )
    parser.add_argument(
        "--timeline",
        metavar="FILE.svg",
        help="also draw what happened when: the pause, device state, each channel, the file",
    )


def _run(args: argparse.Namespace) -> Outcome:
    # qemu.qmp is optional: other verbs work without it.
    from pyqmigrate.vm.outgoing.save import save

    refuse_standard(args.snapshot, "the snapshot of a guest is written to a file")
    place = None if args.timeline is None else check_picture_place(args.timeline, ".svg")
    with shown("vm save") as show:
        report = run_interruptible(
            save(
                args.qmp,
                args.snapshot,
                engine=args.engine,
                then=args.then,
                channels=args.channels,
                direct_io=args.direct_io,
                sparse=args.sparse,
                with_disks=args.with_disks,
                seal=args.seal,
                describe=args.describe == "auto",
                set_time=args.set_time,
                guest_agent=args.guest_agent,
                progress=show,
                **live_options(args),
            )
        )
    if place is not None:
        report = _draw(report, place, str(args.timeline))
    data = report.to_json() | {"timeline_picture": args.timeline}
    if report.seal is not None:
        data["seal"] = seal_data(seal_path(report.snapshot), report.seal)
    lines = [*_lines(report), *([f"timeline  {args.timeline}"] if args.timeline else [])]
    return Outcome(data, [printable(line) for line in lines])


def _draw(report: VmSaveReport, place: Path, path: str) -> VmSaveReport:
    """Draw the timeline. The snapshot is complete whatever happens here: a failure is a note."""
    from pyqmigrate.cli.vm.timeline import picture

    data = picture(report.timeline, *_title(report))
    try:
        write_picture(place, path, lambda file: file.write(data))
    except PyqmigrateError as error:
        note = f"the timeline was not drawn: {error}"
        return dataclasses.replace(report, notes=(*report.notes, note))
    return report


def _title(report: VmSaveReport) -> tuple[str, str]:
    """Return the title of the timeline, and the line below."""
    name = Path(report.snapshot).name
    how = f"engine {report.engine}" if report.method is None else f"live, method {report.method}"
    size = show_size(report.bytes_written)
    rate = show_rate(report.bytes_written, report.seconds)
    return (
        f"{name}: {how}",
        f"{size} written in {report.seconds:.2f} s, {rate} MiB/s, "
        f"{counted(report.channels, 'channel')}, direct I/O {'on' if report.direct_io else 'off'}",
    )


def _lines(report: VmSaveReport) -> Iterator[str]:
    size, allocated = show_size(report.file_size), show_size(report.bytes_allocated)
    yield f"{report.snapshot}: {size}, {allocated} allocated"
    yield f"engine    {report.engine}: {report.why}"
    rate = show_rate(report.bytes_written, report.seconds)
    yield (
        f"written   {show_size(report.bytes_written)} in {report.seconds:.2f} s, {rate} MiB/s, "
        f"{counted(report.channels, 'channel')}, direct I/O {'on' if report.direct_io else 'off'} "
        f"({report.direct_io_reason})"
    )
    if report.method is not None:
        rounds = "" if report.rounds is None else f", {counted(report.rounds, 'round')}"
        yield f"method    {report.method}: {report.method_why}"
        slowdown = "" if report.slowdown is None else f", guest {report.slowdown:.0%} slower"
        yield f"instant   {report.instant} of the save{rounds}{slowdown}"
    downtime = "" if report.downtime is None else f", paused for {report.downtime:.3f} s"
    yield f"guest     {report.run_state_before} before, {_after(report)} now{downtime}"
    yield from setting_lines(report.settings)
    yield from (f"restore   {sentence}" for sentence in report.disks)
    if report.record is not None:
        yield f"record    {report.record}"
    if report.seal is not None:
        yield f"sealed    {report.seal}"
    yield from (f"note      {sentence}" for sentence in report.notes)


def _after(report: VmSaveReport) -> str:
    return "ended" if report.run_state_after is None else report.run_state_after
