"""The companion streams of one snapshot: each is made once, for one guest or many."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Self

from pyqmigrate.io.target import Target
from pyqmigrate.vm.cancellation import owned, unbroken
from pyqmigrate.vm.incoming.companion import Companion
from pyqmigrate.vm.incoming.source import Source

__all__ = ["Companions"]


class Companions:
    """Of an open ``source``, which is closed with them. An asynchronous context manager."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._tasks: dict[tuple[str, ...], asyncio.Task[Companion]] = {}

    @classmethod
    async def open(cls, snapshot: Target, offset: int | None) -> Self:
        """Raises SnapshotError, NotSupported or TargetError for a file that cannot be restored."""
        return cls(await owned(asyncio.to_thread(Source, snapshot, offset), Source.close))

    async def get(self, blocks: Sequence[str]) -> Companion:
        """The stream for a QEMU that maps ``blocks``; it is closed with this."""
        key = tuple(sorted(blocks))
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._build(key))
        return await asyncio.shield(self._tasks[key])

    async def _build(self, blocks: Sequence[str]) -> Companion:
        source = self.source
        sealed = await asyncio.to_thread(source.clear_pages_are_zero)
        companion = Companion(source.snapshot, source.fd, blocks, sealed=sealed)
        building = asyncio.ensure_future(asyncio.to_thread(companion.build))
        try:
            await asyncio.shield(building)
        except BaseException:
            companion.cancel()
            try:
                with contextlib.suppress(Exception):  # what it ends with now is of no interest
                    await unbroken(building)
            finally:
                companion.close()
            raise
        return companion

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await unbroken(self._drop())
        finally:
            self.source.close()

    async def _drop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        for result in await asyncio.gather(*self._tasks.values(), return_exceptions=True):
            if isinstance(result, Companion):
                result.close()
