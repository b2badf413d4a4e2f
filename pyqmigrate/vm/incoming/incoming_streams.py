"""The incoming streams of one snapshot: each is built once, for one guest or many."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pyqmigrate.io.target import Target
from pyqmigrate.vm.cancellation import acquired, shielded
from pyqmigrate.vm.incoming.incoming_stream import IncomingStream
from pyqmigrate.vm.incoming.source import RestoreSource

__all__ = ["IncomingStreams"]


class IncomingStreams:
    """Incoming streams of an open ``source``. An asynchronous context manager, which closes both."""

    def __init__(self, source: RestoreSource) -> None:
        self.source = source
        self._tasks: dict[tuple[str, ...], asyncio.Task[IncomingStream]] = {}

    @classmethod
    async def open(
        cls,
        snapshot: Target,
        offset: int | None,
        base: str | os.PathLike[str] | None = None,
        cache: Path | None = None,
        record: bool = False,
        pages: bool = True,
    ) -> Self:
        """Open a snapshot, as :class:`~pyqmigrate.vm.incoming.source.RestoreSource` does.

        Raises SnapshotError, NotSupported or TargetError if it, or the base of an increment, cannot be
        restored.
        """
        opening = asyncio.to_thread(RestoreSource, snapshot, offset, base, cache, record, pages)
        return cls(await acquired(opening, RestoreSource.close))

    async def get(self, blocks: Sequence[str]) -> IncomingStream:
        """Return the stream for a QEMU that maps ``blocks``; it belongs to this object."""
        key = tuple(sorted(blocks))
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._build(key))
        return await asyncio.shield(self._tasks[key])

    async def _build(self, blocks: Sequence[str]) -> IncomingStream:
        source = self.source
        sealed = await asyncio.to_thread(source.clear_pages_are_zero)
        stream: IncomingStream
        if source.increment is None:
            stream = IncomingStream(source.loaded, source.fd, blocks, sealed=sealed)
        else:
            from pyqmigrate.vm.incoming.increment_stream import IncrementStream

            stream = IncrementStream(source.increment, blocks, sealed=sealed)
        building = asyncio.ensure_future(asyncio.to_thread(stream.build))
        try:
            await asyncio.shield(building)
        except BaseException:
            stream.cancel()
            try:
                with contextlib.suppress(Exception):  # its result is not needed
                    await shielded(building)
            finally:
                stream.close()
            raise
        return stream

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await shielded(self._close_all())
        finally:
            self.source.close()

    async def _close_all(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        for result in await asyncio.gather(*self._tasks.values(), return_exceptions=True):
            if isinstance(result, IncomingStream):
                result.close()
