"""From ``migrate-incoming`` to the guest's run state: over a session of an event loop, or one that blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pyqmigrate.errors import QemuError, QemuRefused
from pyqmigrate.vm.qemu.commands import Commands

__all__ = ["LoadFailed", "load_stream", "settle"]

_FIRST_POLL = 0.0005  # seconds; doubled up to the last
_LAST_POLL = 0.05
_STATE_TIMEOUT = 5.0  # seconds from "completed" to the run state of the stream


class LoadFailed(QemuError):
    """QEMU did not load the snapshot, or cannot resume its guest. What QEMU wrote may say more."""


async def load_stream(monitor: Commands, uri: str) -> float:
    """Have QEMU load; return the seconds until that has ended or, in postcopy, the guest runs.

    Raises LoadFailed with QEMU's reason, and what ``monitor`` raises.
    """
    started = time.monotonic()
    await monitor.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
    answer = await _wait(monitor)
    seconds = time.monotonic() - started
    if answer["status"] in ("failed", "cancelled"):
        reason = answer.get("error-desc", answer["status"])
        raise LoadFailed(f"QEMU failed to load the snapshot: {reason}")
    return seconds


async def settle(
    monitor: Commands, shall_resume: Callable[[str], bool], before_it_runs: Callable[[], None]
) -> str:
    """Wait for the run state of a loaded guest, resume it if it shall, and return the state.

    ``before_it_runs`` is called then; what it raises is passed on. Raises LoadFailed if QEMU cannot resume the
    guest: it stays in ``inmigrate``, or refuses.
    """
    deadline = time.monotonic() + _STATE_TIMEOUT
    while (state := await _run_state(monitor)) == "inmigrate":
        if time.monotonic() > deadline:
            raise _not_resumed("it stays in 'inmigrate'")
        await monitor.pause(0.001)
    if not shall_resume(state):
        return state
    before_it_runs()
    try:
        await monitor.execute("cont")
    except QemuRefused as error:
        raise _not_resumed(error.desc) from error
    return await _run_state(monitor)


async def _wait(monitor: Commands) -> dict[str, Any]:
    """Wait until the load ends or, in postcopy, the guest runs.

    QEMU's main loop reads a mapped-ram file, so its monitor does not answer before the end: the wait
    has no limit.
    """
    pause = _FIRST_POLL
    while True:
        answer: dict[str, Any] = await monitor.execute("query-migrate", timeout=None)
        if answer.get("status") in ("completed", "failed", "cancelled", "postcopy-active"):
            return answer
        await monitor.pause(pause)
        pause = min(2 * pause, _LAST_POLL)


async def _run_state(monitor: Commands) -> str:
    return str((await monitor.execute("query-status"))["status"])


def _not_resumed(reason: str) -> LoadFailed:
    return LoadFailed(f"QEMU loaded the snapshot but cannot resume the guest: {reason}")
