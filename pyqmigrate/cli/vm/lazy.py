"""How the memory of lazily restored guests arrives: options, lines on standard error."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyqmigrate.cli.outcome import counted, printable

if TYPE_CHECKING:
    from pyqmigrate.vm.incoming.lazy_state import Damage, LazyState
    from pyqmigrate.vm.incoming.report import RestoredVm

__all__ = ["LazyLines", "add_lazy", "lazy_shown", "working_set_of"]


def add_lazy(parser: argparse.ArgumentParser) -> None:
    """Add the options of mode lazy."""
    parser.add_argument(
        "--working-set",
        metavar="FILE",
        help="mode lazy: the pages to send first, as recorded (default: SNAPSHOT.workingset); with "
        "--record, the file to write",
    )
    parser.add_argument(
        "--push",
        choices=["idle", "always", "never"],
        default="idle",
        help="mode lazy: when pages are sent that the guest has not asked for: while it asks for none, "
        "always, or never (default: idle)",
    )
    parser.add_argument(
        "--huge-pages",
        action="store_true",
        help="mode lazy: have the kernel make huge pages of the guest's memory when it is complete",
    )


def working_set_of(args: argparse.Namespace) -> Path | None:
    """Return the file of --working-set."""
    return None if args.working_set is None else Path(args.working_set).absolute()


class LazyLines:
    """Prints what is new in each state of one guest: damage, messages, progress, the end.

    ``name`` is put before the lines, for several guests. Progress is shown on a terminal only.
    """

    def __init__(self, name: str = "", pid: int | None = None) -> None:
        self._name = f"{name}: " if name else ""
        self._pid = pid
        self._shown: set[str] = set()
        self._progress = False

    def show(self, state: LazyState) -> None:
        """Print what has not been printed yet."""
        for damage in state.damages:
            self._print(self._damage(damage))
        for warning in state.warnings:
            self._print(warning)
        if state.ended:
            self._end(state)
        elif sys.stderr.isatty() and state.pages_left is not None:
            self._progress = True
            print(
                f"\r\x1b[K{self._name}{counted(state.pages_left, 'page')} left",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def _damage(self, damage: Damage) -> str:
        hint = "" if self._pid is None else f" (vm wait {self._pid} --resume COPY)"
        return f"{damage}; the guest waits there until the page comes from a good copy{hint}"

    def _end(self, state: LazyState) -> None:
        if state.state == "failed":
            self._print(f"the guest does not get the rest of its memory: {state.failure}")
            return
        if state.state == "gone":
            return
        latency = "" if not state.fault_seconds else f", {state.fault_seconds * 1e6:.0f} us each"
        self._print(
            f"the guest has all of its memory; it waited for {counted(state.faults, 'page')}{latency}"
        )

    def _print(self, text: str) -> None:
        if text in self._shown:
            return
        self._shown.add(text)
        start = "\r\x1b[K" * self._progress
        self._progress = False
        print(f"{start}pyqmigrate: {self._name}{printable(text)}", file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def lazy_shown(vms: Sequence[RestoredVm]) -> AsyncIterator[None]:
    """Show how the memory of these guests arrives, while the context lasts."""
    import asyncio  # a restore starts QEMU before

    several = len(vms) > 1
    watches = [
        asyncio.create_task(
            _watch(vm, LazyLines(f"guest {vm.report.pid}" if several else "", vm.report.pid))
        )
        for vm in vms
        if vm.lazy is not None
    ]
    try:
        yield
    finally:
        for watch in watches:
            watch.cancel()
        if watches:
            await asyncio.wait(watches)


async def _watch(vm: RestoredVm, lines: LazyLines) -> None:
    assert vm.lazy is not None
    state = vm.lazy.state
    while True:
        lines.show(state)
        if state.ended:
            return
        state = await vm.lazy.changed()
