"""Wait until a lazily restored guest has all of its memory.

PID is the process of QEMU, as vm restore reports it. Returns at once if no lazy restore of it is under way.
What goes wrong during the wait is printed on standard error: a page of the snapshot that cannot be read or is not
as it was sealed is never sent, and the guest waits when it touches it. With --resume the pages come from COPY
from now on, a good copy of the same snapshot, and the guest goes on.

The exit code is 4 if QEMU ended before it had all of its memory.

JSON: ``state`` (completed); ``pages_left``; ``faults``, how many pages the guest asked for, and
``fault_seconds``, their mean latency in the page server; ``restarts`` of the page server; ``damages``, a list of
``block``, ``page`` and ``why``; ``warnings``, sentences; ``huge``, bytes that were made huge pages; ``loaded`` and
``failure`` (why it failed, or null).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.interruption import run_interruptible
from pyqmigrate.cli.outcome import Outcome, counted

if TYPE_CHECKING:
    from pyqmigrate.vm.incoming.lazy_state import LazyState

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "wait", _run, __doc__)
    parser.add_argument("pid", type=_read_pid, metavar="PID", help="the process of QEMU")
    parser.add_argument(
        "--resume", metavar="COPY", help="a good copy of the snapshot: the pages come from it now"
    )


def _read_pid(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a process id")
    return int(text)


def _run(args: argparse.Namespace) -> Outcome:
    return run_interruptible(_wait(args))


async def _wait(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.cli.vm.lazy import LazyLines
    from pyqmigrate.vm.incoming.lazy_status import wait_for_memory

    lines = LazyLines(pid=args.pid)

    def show(state: LazyState) -> None:
        if not state.ended:
            lines.show(state)

    state = await wait_for_memory(args.pid, resume=args.resume, progress=show)
    return Outcome(state.to_json(), _lines(state))


def _lines(state: LazyState) -> list[str]:
    text = f"memory    complete; the guest waited for {counted(state.faults, 'page')}"
    if state.fault_seconds:
        text += f", {state.fault_seconds * 1e6:.0f} us each"
    lines = [text]
    if state.restarts:
        lines.append(f"server    replaced {counted(state.restarts, 'time')}")
    if state.huge:
        lines.append(f"huge      {state.huge >> 20} MiB in huge pages")
    return lines
