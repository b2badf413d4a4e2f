"""The companion streams of one snapshot: each is made once, for one guest or many."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Self

from pyqmigrate.io.target import Target
from pyqmigrate.vm.cancellation import acquired, shielded
from pyqmigrate.vm.incoming.incoming_stream import IncomingStream
from pyqmigrate.vm.incoming.source import RestoreSource

__all__ = ["IncomingStreams"]


class IncomingStreams:
    """Of an open ``source``, which is closed with them. An asynchronous context manager."""

    def __init__(self, source: RestoreSource) -> None:
        self.source = source
        self._tasks: dict[tuple[str, ...], asyncio.Task[IncomingStream]] = {}

    @classmethod
    async def open(cls, snapshot: Target, offset: int | None) -> Self:
        """Raises SnapshotError, NotSupported or TargetError for a file that cannot be restored."""
        return cls(
            await acquired(asyncio.to_thread(RestoreSource, snapshot, offset), RestoreSource.close)
        )

    async def get(self, blocks: Sequence[str]) -> IncomingStream:
        """The stream for a QEMU that maps ``blocks``; it is closed with this."""
        key = tuple(sorted(blocks))
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._build(key))
        return await asyncio.shield(self._tasks[key])

    async def _build(self, blocks: Sequence[str]) -> IncomingStream:
        source = self.source
        sealed = await asyncio.to_thread(source.clear_pages_are_zero)
        companion = IncomingStream(source.snapshot, source.fd, blocks, sealed=sealed)
        building = asyncio.ensure_future(asyncio.to_thread(companion.build))
        try:
            await asyncio.shield(building)
        except BaseException:
            companion.cancel()
            try:
                with contextlib.suppress(Exception):  # what it ends with now is of no interest
                    await shielded(building)
            finally:
                companion.close()
            raise
        return companion

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await shielded(self._drop())
        finally:
            self.source.close()

    async def _drop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        for result in await asyncio.gather(*self._tasks.values(), return_exceptions=True):
            if isinstance(result, IncomingStream):
                result.close()
