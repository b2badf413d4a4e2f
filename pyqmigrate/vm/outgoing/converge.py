"""The live method ``converge``: QEMU writes while the guest runs, until the rest fits into the pause.

QEMU goes through the memory in rounds: each writes the pages that the guest changed during the one
before. It stops the guest once it expects to write the rest within ``downtime-limit``. A guest that
changes memory as fast as it is written never gets there: then the save is abandoned while the guest
still runs (:class:`Convergence`).

The file holds the end instant. Pages that became zero during the save leave old bytes in the file,
which are removed when the guest runs again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from typing import Any

from pyqmigrate.errors import LiveSaveAbandoned
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Descriptors
from pyqmigrate.qapi.status import Status
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.snapshot.stale import clear_stale, find_stale
from pyqmigrate.vm.cancellation import shielded
from pyqmigrate.vm.outgoing.fdset import open_for_qemu
from pyqmigrate.vm.outgoing.live_save import LiveSave
from pyqmigrate.vm.outgoing.migrate import Written, migrate
from pyqmigrate.vm.outgoing.timeline import Lane
from pyqmigrate.vm.plan.live_converge import DEFAULT_PAUSE

__all__ = ["Convergence", "save_converge"]

_ROUNDS = 3  # the time of so many first rounds is the most that a save may take to converge
# Seconds. QEMU measures how fast it writes ten times a second, so the shortest rounds say little.
_LEAST_TIME = 1.0
_LEAST_OBSERVED = 0.5


async def save_converge(save: LiveSave) -> Written:
    """Have QEMU write into ``save.output`` and, with ``save.resume``, resume the guest.

    Raises LiveSaveAbandoned if the guest changes memory too fast, or if its disks were not
    snapshotted within the promised pause; and as
    :func:`~pyqmigrate.vm.outgoing.qemu.save_qemu` does.
    """
    transaction, promised = save.transaction, save.request.max_pause
    convergence = Convergence(save.live.expected_pause or DEFAULT_PAUSE)

    async def watch(info: dict[str, Any]) -> None:
        if info.get("status") != Status.ACTIVE:
            return
        why_not = convergence.observe(time.monotonic(), info.get("ram", {}))
        if why_not is not None:
            raise LiveSaveAbandoned(why_not)

    async def take_disks() -> None:
        assert save.while_paused is not None
        stopped_at = time.monotonic()
        await save.while_paused()
        seconds = time.monotonic() - stopped_at
        if promised is not None and seconds > promised:
            raise LiveSaveAbandoned(
                f"snapshots of the disks took {seconds * 1e3:.0f} ms of the pause, of which "
                f"{promised * 1e3:.0f} ms were allowed"
            )

    with open_for_qemu(save.output) as fds:
        async with transaction.add_fds(fds) as path:
            await transaction.apply(save.plan.changes)
            info = await migrate(
                transaction,
                path,
                while_paused=None if save.while_paused is None else take_disks,
                pause=True,
                progress=save.options.progress,
                watch=watch,
            )
            if save.while_paused is not None:
                await transaction.check_still_stopped()
            completed_at = time.monotonic()
            for number, start, end in convergence.rounds(completed_at):
                transaction.timeline.add(Lane.QEMU, f"round {number}", start, end)
            if save.resume:
                await transaction.resume()
    downtime = None
    if save.resume:
        measured = time.monotonic() - completed_at + info["downtime"] / 1000
        reported = transaction.events.downtime(measured + 1)
        downtime = measured if reported is None else reported
    with transaction.timeline.phase(Lane.FILE, "remove old bytes"):
        await shielded(asyncio.to_thread(_clear_stale, save.output, save.options.channels))
    ram = info["ram"]
    return Written(
        ram["transferred"], downtime, _notes(downtime, promised), rounds=ram["dirty-sync-count"]
    )


class Convergence:
    """Whether the rest that is to be written gets small enough for a pause of ``max_pause`` seconds.

    A round begins when QEMU has collected what changed (``dirty-sync-count``). From the second
    round on, the rest at the beginning of a round shows whether it shrinks, and how many more
    rounds are needed.
    """

    def __init__(self, max_pause: float) -> None:
        self._max_pause = max_pause
        self._starts: list[tuple[int, float, int]] = []  # of each round: number, time, rest

    def observe(self, now: float, ram: Mapping[str, Any]) -> str | None:
        """Note the state of a migration at the time ``now``; return why it will not converge.

        ``ram`` is that of ``query-migrate``. None: it may converge.
        """
        number, rest = ram.get("dirty-sync-count", 0), ram.get("remaining", 0)
        if not number:
            return None
        new = not self._starts or self._starts[-1][0] != number
        if new:
            self._starts.append((number, now, rest))
        if len(self._starts) < 2:
            return None
        elapsed = now - self._starts[0][1]
        limit = max(_ROUNDS * (self._starts[1][1] - self._starts[0][1]), _LEAST_TIME)
        rate = ram.get("transferred", 0) / elapsed if elapsed else 0.0
        if elapsed > limit or (new and elapsed + self._remaining_time(rate) > limit):
            return self._reason(rate)
        return None

    def rounds(self, ended_at: float) -> list[tuple[int, float, float]]:
        """Return number, start and end of each round that was observed, the last of which ended then."""
        ends = [*(start for _, start, _ in self._starts[1:]), ended_at]
        return [
            (number, start, end) for (number, start, _), end in zip(self._starts, ends, strict=True)
        ]

    def _remaining_time(self, rate: float) -> float:
        """Return how long it takes to converge, by the rounds after the first; 0 if not known."""
        (second, began_at, before), (last, now, rest) = self._starts[1], self._starts[-1]
        wanted = rate * self._max_pause
        if now - began_at < _LEAST_OBSERVED or rest <= wanted or not before or not rate:
            return 0.0
        shrinks_by = (rest / before) ** (1 / (last - second))
        if shrinks_by >= 1 or not wanted:
            return math.inf
        rounds = math.log(wanted / rest) / math.log(shrinks_by)
        time_left: float = rest / rate * (1 - shrinks_by**rounds) / (1 - shrinks_by)
        return time_left

    def _reason(self, rate: float) -> str:
        (_, _, before), (last, _, rest) = self._starts[1], self._starts[-1]
        return (
            f"the guest changes memory about as fast as it is written ({_mib(rate)} MiB/s): "
            f"{_mib(before)} MiB were left at the second round, {_mib(rest)} MiB at round {last}, and "
            f"a pause of {self._max_pause * 1e3:g} ms has time for {_mib(rate * self._max_pause)} MiB"
        )


def _mib(size: float) -> str:
    return f"{size / (1 << 20):.0f}" if size >= 10 << 20 else f"{size / (1 << 20):.1f}"


def _notes(downtime: float | None, promised: float | None) -> tuple[str, ...]:
    if downtime is None or promised is None or downtime <= promised:
        return ()
    return (
        f"the pause was longer than promised, {downtime * 1e3:.1f} ms instead of "
        f"{promised * 1e3:g} ms: the disk was slower than while the guest ran, or the host was busy",
    )


def _clear_stale(output: OutputFile, channels: int) -> None:
    """Remove old bytes under clear bits, so that a restore has nothing to look for."""
    with (
        output.opened_for_reading() as fd,
        output.opened_for_reading() as writable,
        MappedRamSnapshot(StreamFile.open(Descriptors(fd))) as snapshot,
    ):
        workers = Channels(channels, "pyqmigrate-stale")
        if stale := find_stale(snapshot, workers):
            clear_stale(snapshot, writable, stale, workers)
