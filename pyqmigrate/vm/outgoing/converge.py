"""The live method ``converge``: QEMU writes while the guest runs, until the rest fits into the pause."""

from __future__ import annotations

import time
from typing import Any

from pyqmigrate.errors import LiveSaveAbandoned
from pyqmigrate.vm.outgoing.fdset import open_for_qemu
from pyqmigrate.vm.outgoing.live_save import LiveSave
from pyqmigrate.vm.outgoing.migrate import Written, migrate

__all__ = ["save_converge"]

_ROUNDS = 10


async def save_converge(save: LiveSave) -> Written:
    """Have QEMU write into ``save.output`` and, with ``save.resume``, resume the guest.

    Raises LiveSaveAbandoned if the guest changes memory faster than it is written.
    """
    transaction = save.transaction

    async def watch(info: dict[str, Any]) -> None:
        if info.get("ram", {}).get("dirty-sync-count", 0) > _ROUNDS:
            raise LiveSaveAbandoned("the guest changes memory faster than it is written")

    with open_for_qemu(save.output) as fds:
        async with transaction.add_fds(fds) as path:
            await transaction.apply(save.plan.changes)
            info = await migrate(
                transaction,
                path,
                while_paused=save.while_paused,
                pause=True,
                progress=save.options.progress,
                watch=watch,
            )
            if save.while_paused is not None:
                await transaction.check_still_stopped()
            completed_at = time.monotonic()
            if save.resume:
                await transaction.resume()
    downtime = None
    if save.resume:
        since = time.monotonic() - completed_at + info["downtime"] / 1000
        reported = transaction.events.downtime(since)
        downtime = since if reported is None else reported
    ram = info["ram"]
    return Written(ram["transferred"], downtime, rounds=ram["dirty-sync-count"])
