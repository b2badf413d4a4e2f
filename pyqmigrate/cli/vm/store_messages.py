"""What goes wrong with a store while a guest runs from it: lines on standard error."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from pyqmigrate.cli.outcome import printable

__all__ = ["store_messages_shown"]

_INTERVAL = 1.0  # seconds


class _Runs(Protocol):
    """A restored guest, or a pool of them."""

    @property
    def runs_from_store(self) -> bool: ...

    async def store_messages(self) -> Sequence[str]: ...


@contextlib.asynccontextmanager
async def store_messages_shown(vms: Sequence[_Runs]) -> AsyncIterator[None]:
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


async def _watch(vm: _Runs, printed: set[str]) -> None:
    while True:
        await _print_new(vm, printed)
        await asyncio.sleep(_INTERVAL)


async def _print_new(vm: _Runs, printed: set[str]) -> None:
    for text in await vm.store_messages():
        if text not in printed:
            printed.add(text)
            print(f"pyqmigrate: {printable(text)}", file=sys.stderr, flush=True)
