"""qcow2 images: the header, and a new empty image over another one.

As QEMU's docs/interop/qcow2.txt describes them; versions 2 and 3.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = [
    "BACKING_MAX",
    "EXTENSIONS_MAX",
    "HEADER_SIZE",
    "SIZE_MAX",
    "Header",
    "backing_format",
    "decode_header",
    "encode_overlay",
]

MAGIC = b"QFI\xfb"
# magic, version, backing_file_offset, backing_file_size, cluster_bits, size, crypt_method,
# l1_size, l1_table_offset, refcount_table_offset, refcount_table_clusters, nb_snapshots,
# snapshots_offset
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
# incompatible_features, compatible_features, autoclear_features, refcount_order, header_length
_VERSION_3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_END, _BACKING_FORMAT = 0, 0xE2792ACA
HEADER_SIZE = _HEADER.size + _VERSION_3.size
EXTENSIONS_MAX = 1 << 16  # bytes that are looked through
SIZE_MAX = 1 << 51  # bytes of an image that is made here: QEMU's limit of the L1 table, 32 MiB
BACKING_MAX = 1023  # bytes of a name, the format's limit

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_REFCOUNT_ORDER = 4  # refcounts of 16 bits


class Header(NamedTuple):
    """Of one image. Offsets and sizes in bytes; ``l1_entries`` are of 8 bytes each.

    ``backing_offset`` is 0 without a backing file. ``tables`` has the other fields that describe the
    content: offsets and numbers of the refcounts and the internal snapshots.
    """

    backing_offset: int
    backing_size: int
    cluster_bits: int
    size: int
    l1_entries: int
    l1_offset: int
    tables: tuple[int, ...]
    extensions_offset: int

    def described(self) -> bytes:
        """Return everything that describes the content, for a digest."""
        return repr(self[2:7]).encode()


def decode_header(data: bytes) -> Header | None:
    """Return the header in the first bytes of a file (``HEADER_SIZE`` are enough); None if the file
    is not a qcow2 image."""
    if len(data) < _HEADER.size:
        return None
    magic, version, offset, size, bits, length, _, l1, l1_at, *tables = _HEADER.unpack_from(data)
    if magic != MAGIC or version not in (2, 3):
        return None
    extensions = _HEADER.size
    if version == 3:
        if len(data) < HEADER_SIZE:
            return None
        extensions = _VERSION_3.unpack_from(data, _HEADER.size)[-1]
    return Header(offset, size, bits, length, l1, l1_at, tuple(tables), extensions)


def backing_format(extensions: bytes) -> str | None:
    """Return the format of the backing file from the bytes at ``extensions_offset``; None if they do
    not record it."""
    at = 0
    while at + _EXTENSION.size <= len(extensions):
        kind, length = _EXTENSION.unpack_from(extensions, at)
        at += _EXTENSION.size
        if kind == _END:
            break
        if kind == _BACKING_FORMAT:
            return extensions[at : at + length].decode("ascii", "replace")
        at += -(-length // 8) * 8
    return None


def encode_overlay(size: int, backing: bytes, backing_format: str) -> list[tuple[int, bytes]]:
    """Return a new, empty image of ``size`` bytes over ``backing``.

    The result is pairs of file offset and bytes, with zeros between them; the last one ends the file.
    The caller checks that the image has at most ``SIZE_MAX`` bytes and the name of the backing file at
    most ``BACKING_MAX``.
    """
    entries = max(1, -(-size // (_CLUSTER * (_CLUSTER // 8))))
    l1_clusters = -(-entries * 8 // _CLUSTER)
    # Clusters: header, refcount table, refcount block, L1 table.
    used = 3 + l1_clusters
    kind = backing_format.encode("ascii")
    padded = kind.ljust(-(-len(kind) // 8) * 8, b"\0")
    extensions = _EXTENSION.pack(_BACKING_FORMAT, len(kind)) + padded + _EXTENSION.pack(_END, 0)
    place = HEADER_SIZE + len(extensions)
    header = _HEADER.pack(
        MAGIC,
        3,
        place,
        len(backing),
        _CLUSTER_BITS,
        size,
        0,
        entries,
        3 * _CLUSTER,
        _CLUSTER,
        1,
        0,
        0,
    ) + _VERSION_3.pack(0, 0, 0, _REFCOUNT_ORDER, HEADER_SIZE)
    return [
        (0, header + extensions + backing),
        (_CLUSTER, struct.pack(">Q", 2 * _CLUSTER)),
        (2 * _CLUSTER, struct.pack(">H", 1) * used),
        (3 * _CLUSTER, bytes(l1_clusters * _CLUSTER)),
    ]
