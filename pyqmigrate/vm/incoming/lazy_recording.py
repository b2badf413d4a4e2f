"""The recording of a working set in mode lazy: the page server notes what the guest requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.io.working_set_file import read_working_set
from pyqmigrate.vm.incoming.lazy_process import KeeperProcess
from pyqmigrate.vm.incoming.recording import WorkingSetReport

__all__ = ["LazyRecorder"]


class LazyRecorder:
    """A recording into ``path``, which is written when the guest has all of its memory.

    ``result`` is the report then. :meth:`stop` ends only the wait for it. Needs a running event loop.
    """

    def __init__(self, keeper: KeeperProcess, path: str) -> None:
        self.path = Path(path)
        self._keeper = keeper
        self.result: asyncio.Future[WorkingSetReport] = asyncio.ensure_future(self._wait())
        self.result.add_done_callback(_retrieved)
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Wait no longer: the result is an error, unless the file is written."""
        self._stopped.set()

    drop = stop

    async def _wait(self) -> WorkingSetReport:
        waits = [
            asyncio.create_task(wait) for wait in (self._keeper.completed(), self._stopped.wait())
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not waits[0].done():
                raise UsageError(
                    f"the recording goes on: {self.path} is written when the guest has all of its "
                    "memory"
                )
            await waits[0]
            state = self._keeper.state
            if state.restarts:
                raise PyqmigrateError(
                    "the page server was replaced, and what it had recorded is lost"
                )
            found = await asyncio.to_thread(read_working_set, self.path)
            if found is None:
                raise PyqmigrateError("; ".join(state.warnings) or f"{self.path} was not written")
            return WorkingSetReport(self.path, found.working_set.npages, found.seconds, True)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)


def _retrieved(result: asyncio.Future[WorkingSetReport]) -> None:
    if not result.cancelled():
        result.exception()  # the caller need not await it
