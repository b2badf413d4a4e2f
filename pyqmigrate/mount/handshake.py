"""The first request of the kernel, by which both sides agree on what they can do."""

from __future__ import annotations

import errno
import os
import select

from pyqmigrate.errors import NotSupported, TargetError
from pyqmigrate.mount import protocol
from pyqmigrate.mount.connection import reply_to_kernel
from pyqmigrate.mount.protocol import Request

__all__ = ["answer_init"]

_LIMIT = 30.0  # seconds for the request
_WANTED = (
    protocol.ASYNC_READ
    | protocol.PARALLEL_DIROPS
    | protocol.MAX_PAGES
    | protocol.EXPLICIT_INVAL_DATA
    | protocol.INIT_EXT
    | protocol.HAS_RESEND
)


def answer_init(fd: int, directory: str, *, resend: bool = True) -> bool:
    """Answer the first request on ``fd``, the connection of the mount at ``directory``.

    Return whether the kernel sends the requests of a worker that died again, when it is asked to; with
    ``resend`` False it is not wanted. Raises TargetError if there is no request within 30 s, NotSupported
    for a kernel before Linux 5.4, OSError.
    """
    ready, _, _ = select.select([fd], [], [], _LIMIT)
    if not ready:
        raise TargetError(errno.ETIMEDOUT, "the kernel is silent", directory)
    buffer = bytearray(protocol.REQUEST_MAX)
    length = os.readv(fd, [buffer])
    request = Request.decode(buffer, length)
    init = protocol.decode_init(memoryview(buffer)[protocol.HEADER_BYTES : length])
    if request.operation != protocol.INIT or init[:2] < (7, protocol.MINOR_MIN):
        reply_to_kernel(fd, request.unique, error=errno.EPROTO)
        raise NotSupported(
            f"this kernel has FUSE {init.major}.{init.minor}; 7.{protocol.MINOR_MIN} is needed "
            "(Linux 5.4)"
        )
    want = _WANTED & init.flags
    if not resend:
        want &= ~protocol.HAS_RESEND
    reply_to_kernel(fd, request.unique, [protocol.encode_init(init, want)])
    return bool(want & protocol.HAS_RESEND)
