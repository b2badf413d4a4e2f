"""The header that libvirt puts before the stream in a save image.

::

    0    16   magic: LibvirtQemudSave, or LibvirtQemudPart until the save is complete
    16   u32  version, 1 or 2
    20   u32  data length: bytes from 92 to the stream
    24   u32  the guest was running, 0 or 1
    28   u32  image format: 0 raw, 1 to 5 compressed, 6 sparse
    32   u32  cookie offset, from 92; 0 without a cookie
    36   56   zeros
    92        domain XML, NUL; the cookie's XML, NUL; zeros that leave room for another XML

Numbers are in the byte order of the host that wrote them. ``raw`` is followed by a sequential stream,
``sparse`` by a mapped-ram stream, whose offsets are absolute in the file. Both start unaligned, right
after the padding (docs/internals/format.md, "libvirt's header").

    header = read_header(source)
    open_snapshot(path, offset=header.stream_offset)
"""

from __future__ import annotations

import enum
import struct
from typing import Literal, NamedTuple

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.cursor import ByteSource

__all__ = [
    "MAGIC_LENGTH",
    "ImageFormat",
    "LibvirtHeader",
    "encode_header",
    "is_libvirt",
    "read_header",
]

_COMPLETE = b"LibvirtQemudSave"
_PARTIAL = b"LibvirtQemudPart"
_NUMBERS = "5I"
MAGIC_LENGTH = len(_COMPLETE)
_LENGTH = 92  # of the header, up to the XML
_VERSIONS = (1, 2)
_LARGEST_DATA = 1 << 26  # bytes; libvirt writes the XML's size and 64 KiB


class ImageFormat(enum.IntEnum):
    """The form of the QEMU stream after the header: plain, or compressed as a whole."""

    RAW = 0
    GZIP = 1
    BZIP2 = 2
    XZ = 3
    LZOP = 4
    ZSTD = 5
    SPARSE = 6

    @property
    def compressed(self) -> bool:
        return self not in (ImageFormat.RAW, ImageFormat.SPARSE)


class LibvirtHeader(NamedTuple):
    """libvirt's record of a saved guest.

    ``complete`` is false while libvirt writes and after a failed save; such an image must not be
    restored. ``xml`` and ``cookie`` (which may be empty) are text as stored, not checked to be XML.
    ``stream_offset`` is the file offset of the stream.
    """

    complete: bool
    version: int
    format: ImageFormat
    was_running: bool
    xml: str
    cookie: str
    stream_offset: int
    byte_order: Literal["little", "big"]


def is_libvirt(head: bytes) -> bool:
    """Return whether a file that begins with these bytes (16 or more) is an image of libvirt."""
    return head.startswith((_COMPLETE, _PARTIAL))


def read_header(source: ByteSource) -> LibvirtHeader:
    """Decode the header at the start of a file.

    An incomplete image is decoded too: see ``complete``.

    Raises SnapshotError if the file is not an image of libvirt, the header is cut short, or a field
    is invalid.
    """
    head = source.read_at(0, _LENGTH)
    if not is_libvirt(head):
        raise SnapshotError("this is not a libvirt image: its magic is missing", offset=0)
    if len(head) < _LENGTH:
        raise SnapshotError("the file ends inside libvirt's header", offset=len(head))
    order, numbers = _numbers(head)
    version, length, running, kind, cookie_at = numbers
    if not 2 <= length <= _LARGEST_DATA:
        raise _bad(f"{length} bytes of domain XML are not plausible", 1, "data length")
    if running not in (0, 1):
        raise _bad(f"{running} is neither 0 nor 1", 2, "was_running")
    if kind not in list(ImageFormat):
        raise _bad(f"image format {kind} is not known", 3, "format")
    data = source.read_at(_LENGTH, length)
    if len(data) < length:
        raise SnapshotError(
            "the file ends inside libvirt's XML", offset=_LENGTH + len(data), field="data length"
        )
    xml = _text(data, 0, "domain XML")
    if cookie_at and not len(xml) < cookie_at < length:
        raise _bad(f"{cookie_at} does not lie behind the domain XML", 4, "cookie offset")
    return LibvirtHeader(
        complete=head.startswith(_COMPLETE),
        version=version,
        format=ImageFormat(kind),
        was_running=bool(running),
        xml=_decoded(xml),
        cookie=_decoded(_text(data, cookie_at, "cookie")) if cookie_at else "",
        stream_offset=_LENGTH + length,
        byte_order=order,
    )


def encode_header(header: LibvirtHeader) -> bytes:
    """Return the bytes up to the stream, padded with zeros to ``header.stream_offset``.

    Raises ValueError if the texts do not fit or contain a NUL.
    """
    texts = [text.encode("utf-8", "surrogateescape") for text in (header.xml, header.cookie)]
    if any(b"\0" in text for text in texts):
        raise ValueError("a NUL ends the text before its end")
    xml, cookie = texts
    data = xml + b"\0" + (cookie + b"\0" if cookie else b"")
    length = header.stream_offset - _LENGTH
    if len(data) > length:
        raise ValueError(f"{len(data)} bytes of XML do not fit before {header.stream_offset:#x}")
    numbers = struct.pack(
        _prefix(header.byte_order) + _NUMBERS,
        header.version,
        length,
        header.was_running,
        header.format,
        len(xml) + 1 if cookie else 0,
    )
    head = (_COMPLETE if header.complete else _PARTIAL) + numbers
    return head.ljust(_LENGTH, b"\0") + data.ljust(length, b"\0")


def _numbers(head: bytes) -> tuple[Literal["little", "big"], tuple[int, ...]]:
    orders: tuple[Literal["little", "big"], ...] = ("little", "big")
    for order in orders:
        numbers = struct.unpack_from(_prefix(order) + _NUMBERS, head, MAGIC_LENGTH)
        if numbers[0] in _VERSIONS:
            return order, numbers
    raise _bad(f"unknown version {head[16:20].hex()}", 0, "version")


def _prefix(order: Literal["little", "big"]) -> str:
    return "<" if order == "little" else ">"


def _text(data: bytes, start: int, what: str) -> bytes:
    end = data.find(b"\0", start)
    if end < 0:
        raise SnapshotError("the text has no final NUL", offset=_LENGTH + start, field=what)
    return data[start:end]


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _bad(message: str, number: int, field: str) -> SnapshotError:
    return SnapshotError(message, offset=MAGIC_LENGTH + 4 * number, field=field)
