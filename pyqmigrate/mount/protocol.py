"""The kernel's FUSE protocol, as far as a read-only file system needs it.

A request is a header (:class:`Request`) and a body; a reply is a header and a body. The structures are
those of ``linux/fuse.h``, version 7.31 and later, in the byte order of the host. A request comes
from the kernel, but its lengths are checked all the same: :class:`BadRequest` is answered with EINVAL.
"""

from __future__ import annotations

import errno
import stat
import struct
import sys
from collections.abc import Sequence
from typing import NamedTuple

__all__ = [
    "ROOT",
    "Attributes",
    "BadRequest",
    "Init",
    "Request",
    "decode_handle",
    "decode_init",
    "decode_name",
    "decode_range",
    "decode_seek",
    "decode_unique",
    "encode_attributes",
    "encode_directory_entry",
    "encode_entry",
    "encode_init",
    "encode_notify_store",
    "encode_notify_resend",
    "encode_open",
    "encode_reply",
    "encode_seek",
    "encode_statfs",
]

# Operations.
LOOKUP = 1
FORGET = 2
GETATTR = 3
OPEN = 14
READ = 15
STATFS = 17
RELEASE = 18
FLUSH = 25
INIT = 26
OPENDIR = 27
READDIR = 28
RELEASEDIR = 29
INTERRUPT = 36
DESTROY = 38
BATCH_FORGET = 42
LSEEK = 46

# Flags of INIT that are of use here.
ASYNC_READ = 1 << 0
PARALLEL_DIROPS = 1 << 18
MAX_PAGES = 1 << 22
EXPLICIT_INVAL_DATA = 1 << 25
INIT_EXT = 1 << 30
HAS_RESEND = 1 << 39  # Linux 6.9

KEEP_CACHE = 1 << 1  # of OPEN: the page cache stays valid when a file is opened again

ROOT = 1  # the node of the directory
RESENT = 1 << 63  # in the number of a request that was sent before
UNKNOWN_NODE = 0xFFFFFFFF  # in a listing: the kernel finds the number when it needs it
PAGES_MAX = 256  # of one request: 1 MiB, what fs.fuse.max_pages_limit allows
REQUEST_MAX = 64 << 10  # bytes; the longest that a read-only file system gets are batches of FORGET
MINOR_MIN = 31  # 7.31 is Linux 5.4

_NOTIFY_STORE = 4
_NOTIFY_RESEND = 7
_MAJOR = 7
_MINOR = 45  # the version that this file was written for
_BACKGROUND = 64  # requests of read-ahead that may be out at once
_NAME_MAX = 255
_BLOCK = 4096

_HEADER = struct.Struct("=IIQQIIIHH")
_REPLY = struct.Struct("=IiQ")
_INIT_IN = struct.Struct("=IIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ATTR_OUT = struct.Struct("=QII")
_ENTRY = struct.Struct("=QQQQII")
_OPEN_OUT = struct.Struct("=QIi")
_RANGE = struct.Struct("=QQI")  # of READ and READDIR: handle, offset, length
_SEEK = struct.Struct("=QQI")
_SEEK_OUT = struct.Struct("=Q")
_UNIQUE = struct.Struct("=Q")
_STATFS = struct.Struct("=QQQQQIIII24x")
_DIRENT = struct.Struct("=QQII")
_STORE = struct.Struct("=QQII")


class BadRequest(OSError):
    """A request that is cut off, or not as the protocol has it."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EINVAL, what)


class Request(NamedTuple):
    """The header of a request. ``pid`` is the thread that waits, 0 if it is in another namespace."""

    length: int
    operation: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    extensions: int
    padding: int

    @classmethod
    def decode(cls, buffer: bytes | bytearray | memoryview, length: int) -> Request:
        """Return the header of a request of ``length`` bytes in ``buffer``. Raises BadRequest."""
        if length < _HEADER.size:
            raise BadRequest(f"a request of {length} bytes")
        request = cls._make(_HEADER.unpack_from(buffer))
        if request.length != length:
            raise BadRequest(f"a request of {length} bytes that names {request.length}")
        return request


HEADER_BYTES = _HEADER.size


class Init(NamedTuple):
    """The kernel's side of the first request."""

    major: int
    minor: int
    max_readahead: int
    flags: int


class Attributes(NamedTuple):
    """What ``stat`` shows of a node: ``size`` and ``allocated`` in bytes, the time in nanoseconds."""

    node: int
    mode: int
    size: int
    allocated: int
    mtime_ns: int
    uid: int
    gid: int

    def encode(self) -> bytes:
        seconds, nanoseconds = divmod(self.mtime_ns, 10**9)
        links = 2 if stat.S_ISDIR(self.mode) else 1
        return _ATTR.pack(
            self.node,
            self.size,
            -(-self.allocated // 512),
            *(seconds & (1 << 64) - 1,) * 3,
            *(nanoseconds,) * 3,
            self.mode,
            links,
            self.uid,
            self.gid,
            0,
            _BLOCK,
            0,
        )


def decode_init(body: bytes | memoryview) -> Init:
    """Return the body of INIT. Raises BadRequest."""
    major, minor, readahead, flags = _unpack(_INIT_IN, body)
    if flags & INIT_EXT and len(body) >= _INIT_IN.size + 4:
        flags |= int.from_bytes(body[_INIT_IN.size : _INIT_IN.size + 4], sys.byteorder) << 32
    return Init(major, minor, readahead, flags)


def encode_init(init: Init, want: int) -> bytes:
    """Return the answer to INIT that takes the flags ``want``, all of which the kernel has offered."""
    return _INIT_OUT.pack(
        _MAJOR,
        min(init.minor, _MINOR),
        init.max_readahead,
        want & 0xFFFFFFFF,
        _BACKGROUND,
        _BACKGROUND * 3 // 4,
        _BLOCK,  # max_write; it is a part of the length of the buffer that reads need
        1,  # time granularity in nanoseconds
        PAGES_MAX,
        0,
        want >> 32,
        0,
        0,
    )


def decode_name(body: bytes | memoryview) -> str:
    """Return the name of LOOKUP. Raises BadRequest."""
    name = bytes(body)
    if not name.endswith(b"\0") or name.find(b"\0") != len(name) - 1 or len(name) == 1:
        raise BadRequest("a name without its end")
    return name[:-1].decode("utf-8", "surrogateescape")


def decode_range(body: bytes | memoryview) -> tuple[int, int, int]:
    """Return handle, offset and length of READ and READDIR. Raises BadRequest."""
    handle, offset, length = _unpack(_RANGE, body)
    if offset >= 1 << 63 or length > PAGES_MAX * _BLOCK:
        raise BadRequest(f"a read of {length} bytes at {offset:#x}")
    return handle, offset, length


def decode_seek(body: bytes | memoryview) -> tuple[int, int]:
    """Return offset and kind (os.SEEK_DATA, os.SEEK_HOLE) of LSEEK. Raises BadRequest."""
    _, offset, whence = _unpack(_SEEK, body)
    return offset, whence


def decode_unique(body: bytes | memoryview) -> int:
    """Return the number of the request that INTERRUPT means. Raises BadRequest."""
    unique: int = _unpack(_UNIQUE, body)[0]
    return unique


def decode_handle(body: bytes | memoryview) -> int:
    """Return the handle of RELEASEDIR. Raises BadRequest."""
    handle: int = _unpack(_UNIQUE, body)[0]
    return handle


def encode_reply(unique: int, length: int, error: int = 0) -> bytes:
    """Return the header of a reply with a body of ``length`` bytes; ``error`` is an errno."""
    return _REPLY.pack(_REPLY.size + length, -error, unique)


def encode_attributes(attributes: Attributes, seconds: int) -> bytes:
    """Return the answer to GETATTR; the kernel may keep it for ``seconds``."""
    return _ATTR_OUT.pack(seconds, 0, 0) + attributes.encode()


def encode_entry(attributes: Attributes, name_seconds: int, seconds: int) -> bytes:
    """Return the answer to LOOKUP; the kernel may keep the name and the attributes for so long."""
    return _ENTRY.pack(attributes.node, 0, name_seconds, seconds, 0, 0) + attributes.encode()


def encode_open(handle: int, flags: int = 0) -> bytes:
    return _OPEN_OUT.pack(handle, flags, 0)


def encode_seek(offset: int) -> bytes:
    return _SEEK_OUT.pack(offset)


def encode_statfs() -> bytes:
    """Return the answer to STATFS: no free space, names of 255 bytes."""
    return _STATFS.pack(0, 0, 0, 0, 0, _BLOCK, _NAME_MAX, _BLOCK, 0)


def encode_directory_entry(node: int, next_offset: int, name: bytes, directory: bool) -> bytes:
    """Return one entry of READDIR, with its padding."""
    kind = (stat.S_IFDIR if directory else stat.S_IFREG) >> 12
    entry = _DIRENT.pack(node, next_offset, len(name), kind) + name
    return entry + bytes(-len(entry) % 8)


def encode_notify_store(node: int, offset: int, length: int) -> bytes:
    """Return what precedes ``length`` bytes that go into the page cache of a node at ``offset``."""
    header = _REPLY.pack(_REPLY.size + _STORE.size + length, _NOTIFY_STORE, 0)
    return header + _STORE.pack(node, offset, length, 0)


def encode_notify_resend() -> bytes:
    """Return the message that has the kernel send again all requests without a reply."""
    return _REPLY.pack(_REPLY.size, _NOTIFY_RESEND, 0)


def _unpack(form: struct.Struct, body: bytes | memoryview) -> Sequence[int]:
    if len(body) < form.size:
        raise BadRequest(f"a body of {len(body)} bytes instead of {form.size}")
    return form.unpack_from(body)
