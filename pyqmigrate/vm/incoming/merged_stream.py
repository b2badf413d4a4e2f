"""An increment merged with its base, as a sequential stream.

    async with merged_stream(increment) as fd:
        ...                                     # QEMU loads from fd

QEMU reads the stream while it is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator

from pyqmigrate.enums import Format
from pyqmigrate.errors import Cancelled, QemuError, TargetError
from pyqmigrate.export.convert import start_stream_conversion
from pyqmigrate.io.awaiting import end_of
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.increment import IncrementSnapshot
from pyqmigrate.snapshot.save.writer import SaveReport
from pyqmigrate.vm.cancellation import shielded

__all__ = ["merged_stream"]

_HUNG_UP = (errno.EPIPE, errno.ECONNRESET)


@contextlib.asynccontextmanager
async def merged_stream(increment: IncrementSnapshot) -> AsyncIterator[int]:
    """Start to write the merged stream into a socket; yield the end to read from.

    If the body fails because the stream failed, the error of the stream is raised instead: one of
    reading the snapshots. Writing ends with the body.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)  # so that writing can be cancelled
        target = Descriptors(ours.fileno())
        job = start_stream_conversion(increment, target, to=Format.SEQUENTIAL)
        writing = asyncio.ensure_future(end_of(job))
        writing.add_done_callback(lambda _: _hang_up(ours))
        try:
            yield theirs.fileno()
        except QemuError as error:
            failure = await _stop(writing)
            if failure is not None:
                raise failure from error
            raise
        finally:
            job.cancel()
            await _stop(writing)


def _hang_up(end: socket.socket) -> None:
    """Let the reader know that nothing follows."""
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_WR)


async def _stop(writing: asyncio.Future[SaveReport]) -> Exception | None:
    """End the writing; return why it failed, unless that is the reader's doing or ours."""
    if not writing.done():
        writing.cancel()
    with contextlib.suppress(Exception, asyncio.CancelledError):
        await shielded(asyncio.wait([writing]))
    if writing.cancelled():
        return None
    error = writing.exception()
    if isinstance(error, Cancelled) or not isinstance(error, Exception):
        return None
    return None if isinstance(error, TargetError) and error.errno in _HUNG_UP else error
