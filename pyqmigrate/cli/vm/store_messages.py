"""What goes wrong with a store while a guest runs from it: lines on standard error."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from pyqmigrate.cli.outcome import printable

if TYPE_CHECKING:
    from pyqmigrate.vm.incoming.report import RestoredVm

__all__ = ["store_messages_shown"]

_INTERVAL = 1.0  # seconds


@contextlib.asynccontextmanager
async def store_messages_shown(vms: Sequence[RestoredVm]) -> AsyncIterator[None]:
    """Print each new message about the store that the guests run from, and at the end what is left."""
    stored = next((vm for vm in vms if vm.runs_from_store), None)  # they share one view
    if stored is None:
        yield
        return
    printed: set[str] = set()
    watching = asyncio.create_task(_watch(stored, printed))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        await _print_new(stored, printed)


async def _watch(vm: RestoredVm, printed: set[str]) -> None:
    while True:
        await _print_new(vm, printed)
        await asyncio.sleep(_INTERVAL)


async def _print_new(vm: RestoredVm, printed: set[str]) -> None:
    for text in await vm.store_messages():
        if text not in printed:
            printed.add(text)
            print(f"pyqmigrate: {printable(text)}", file=sys.stderr, flush=True)
