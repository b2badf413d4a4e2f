"""Where a migration goes to or comes from, as ``migrate`` and ``migrate-incoming`` say it.

Either a URI (``file:/snap/guest,offset=4k``) or a list of channels, of which the main one holds
the address. Pure: nothing is opened. Every transport of QEMU's is recognised, since checks name
what is wrong with it; only files and named descriptors carry more than their transport here.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum

from pyqmigrate.errors import UsageError
from pyqmigrate.format.uri import parse_file_uri
from pyqmigrate.qapi import types as qapi

__all__ = ["Address", "Transport", "channels_shape", "parse_address", "parse_uri"]


class Transport(StrEnum):
    """How the stream travels."""

    FILE = "file"
    FD = "fd"
    SOCKET = "socket"
    EXEC = "exec"
    RDMA = "rdma"


@dataclass(frozen=True, slots=True)
class Address:
    """A transport; for FILE the path and the start offset in bytes, for FD the name in ``path``."""

    transport: Transport
    path: str = ""
    offset: int = 0


_INET: dict[str, qapi.Shape] = {
    "host": qapi.STR,
    "port": qapi.STR,
    "numeric": qapi.optional(qapi.BOOL),
    "to": qapi.optional(qapi.UINT16),
    "ipv4": qapi.optional(qapi.BOOL),
    "ipv6": qapi.optional(qapi.BOOL),
    "keep-alive": qapi.optional(qapi.BOOL),
    "keep-alive-count": qapi.optional(qapi.UINT32),
    "keep-alive-idle": qapi.optional(qapi.UINT32),
    "keep-alive-interval": qapi.optional(qapi.UINT32),
    "mptcp": qapi.optional(qapi.BOOL),
}
_UNIX: dict[str, qapi.Shape] = {
    "path": qapi.STR,
    "abstract": qapi.optional(qapi.BOOL),
    "tight": qapi.optional(qapi.BOOL),
}


def channels_shape(lacks: AbstractSet[str] = frozenset()) -> qapi.ListOf:
    """Return the shape of the ``channels`` argument; ``lacks`` are members that are not known."""
    inet = qapi.Struct({name: shape for name, shape in _INET.items() if name not in lacks})
    sockets = {
        "inet": inet,
        "unix": qapi.Struct(_UNIX),
        "vsock": qapi.Struct({"cid": qapi.STR, "port": qapi.STR}),
        "fd": qapi.Struct({"str": qapi.STR}),
    }
    transports = {
        "socket": qapi.Struct({"type": qapi.Words(tuple(sockets))}, "type", sockets),
        "exec": qapi.Struct({"args": qapi.ListOf(qapi.STR)}),
        "rdma": inet,
        "file": qapi.Struct({"filename": qapi.STR, "offset": qapi.UINT64}),
    }
    address = qapi.Struct({"transport": qapi.Words(tuple(transports))}, "transport", transports)
    return qapi.ListOf(qapi.Struct({"channel-type": qapi.Words(("main", "cpr")), "addr": address}))


_CHANNELS = channels_shape()

_SCHEMES = {
    "exec:": Transport.EXEC,
    "rdma:": Transport.RDMA,
    "tcp:": Transport.SOCKET,
    "unix:": Transport.SOCKET,
    "vsock:": Transport.SOCKET,
}


def parse_address(uri: str | None, channels: object = None, *, incoming: bool = False) -> Address:
    """Return the address that exactly one of ``uri`` and ``channels`` gives.

    ``channels`` is the JSON list of migrate; an empty one counts as none. Raises UsageError
    with QEMU's text; a list without a main entry, which kills QEMU 10.0.2, is refused too.
    """
    entries = (
        []
        if channels is None
        else qapi.Struct({"channels": _CHANNELS}).read({"channels": channels})["channels"]
    )
    assert isinstance(entries, list)
    if (uri is None) == (not entries):
        raise UsageError("need either 'uri' or 'channels' argument")
    if uri is not None:
        return parse_uri(uri)
    if incoming and len(entries) > 1:
        raise UsageError("Channel list must have only one entry, for type 'main'")
    main = [entry for entry in entries if entry["channel-type"] == "main"]
    if len(main) > 1:
        raise UsageError("Channel list has more than one main entry")
    if not main or len(entries) > 1:
        raise UsageError("Channel list must have one entry, for type 'main'")
    address = main[0]["addr"]
    if address["transport"] == "file":
        return Address(Transport.FILE, address["filename"], address["offset"])
    if address["transport"] == "socket" and address["type"] == "fd":
        return Address(Transport.FD, address["str"])
    return Address(Transport(address["transport"]))


def parse_uri(uri: str) -> Address:
    """Return the address that a migration URI names. Raises UsageError with QEMU's text."""
    if uri.startswith("fd:"):
        return Address(Transport.FD, uri.removeprefix("fd:"))
    for scheme, transport in _SCHEMES.items():
        if uri.startswith(scheme):
            return Address(transport)
    path, offset = parse_file_uri(uri)
    return Address(Transport.FILE, path, offset)
