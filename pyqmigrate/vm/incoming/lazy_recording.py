"""The recording of a working set in mode lazy: the page server notes what the guest requests."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.io.view import ViewOptions, open_view
from pyqmigrate.io.working_set_file import RecordedWorkingSet, read_working_set, working_set_path
from pyqmigrate.vm.incoming.lazy_process import KeeperProcess
from pyqmigrate.vm.incoming.recording import WorkingSetReport

__all__ = ["LazyRecorder"]


class LazyRecorder:
    """A recording into ``path``, which is written when the guest has all of its memory.

    ``stored`` is the snapshot ``STORE#NAME`` whose store keeps it, None for a file. ``result`` is the
    report then. :meth:`stop` ends only the wait for it. Needs a running event loop.
    """

    def __init__(self, keeper: KeeperProcess, path: str, stored: str | None = None) -> None:
        self.path = path if stored is not None else Path(path)
        self._stored = stored
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
            found = await asyncio.to_thread(self._read)
            if found is None:
                raise PyqmigrateError("; ".join(state.warnings) or f"{self.path} was not written")
            return WorkingSetReport(self.path, found.working_set.npages, found.seconds, True)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)

    def _read(self) -> RecordedWorkingSet | None:
        if self._stored is None:
            return read_working_set(Path(self.path))
        view = open_view(self._stored, ViewOptions(pages=False))
        if view is None:
            return None
        with contextlib.closing(view):
            return read_working_set(working_set_path(view.path))


def _retrieved(result: asyncio.Future[WorkingSetReport]) -> None:
    if not result.cancelled():
        result.exception()  # the caller need not await it
