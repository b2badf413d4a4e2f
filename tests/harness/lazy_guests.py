"""Guests restored in mode lazy: they go on, and have all of their memory in the end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyqmigrate.vm.incoming.lazy_state import LazyState
from pyqmigrate.vm.incoming.report import RestoredVm, RestoreReport
from pyqmigrate.vm.incoming.restore import restore
from tests.harness.saved import Saved, goes_on, memory_of

__all__ = ["children_of", "kill_server", "lazily_whole", "restored_lazily", "server_of"]


async def restored_lazily(
    saved: Saved, serial: Path, *arguments: str, **options: Any
) -> tuple[RestoreReport, LazyState]:
    """Restore a guest that runs, in mode lazy; it must count on with its pattern whole."""
    command = saved.command(*arguments, serial=serial)
    vm = await restore(saved.path, command, mode="lazy", **options)
    try:
        state = await _complete(vm)
        await goes_on(saved, vm, serial)
        return vm.report, state
    finally:
        await vm.end()


async def lazily_whole(
    saved: Saved, serial: Path, *arguments: str, compared: bool = False, **options: Any
) -> tuple[RestoreReport, LazyState]:
    """Restore a guest and wait for its memory; ``compared``: every block is as it was saved."""
    command = saved.command(*arguments, serial=serial)
    vm = await restore(saved.path, command, mode="lazy", **options)
    try:
        state = await _complete(vm)
        if compared:
            memory = await memory_of(vm.monitor, vm.process.pid)
            assert memory.keys() == saved.memory.keys()
            differing = [name for name, data in memory.items() if data != saved.memory[name]]
            assert not differing
        return vm.report, state
    finally:
        await vm.end()


async def _complete(vm: RestoredVm) -> LazyState:
    assert vm.lazy is not None
    state = await vm.lazy.completed()
    answer = await vm.monitor.execute("query-migrate")
    assert answer["status"] == "completed"
    return state


def children_of(pid: int) -> Iterator[int]:
    """The process ids of a process's children."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            yield from map(int, (task / "children").read_text().split())


def server_of(vm: RestoredVm) -> int | None:
    """The process id of the page server of a guest; None while there is none."""
    assert vm.lazy is not None
    try:
        return next(children_of(vm.lazy.process.pid), None)
    except OSError:
        return None


def kill_server(vm: RestoredVm) -> bool:
    """SIGKILL the page server; return whether there was one."""
    pid = server_of(vm)
    if pid is None:
        return False
    os.kill(pid, signal.SIGKILL)
    return True
