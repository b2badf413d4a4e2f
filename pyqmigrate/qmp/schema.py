"""The result of ``query-qmp-schema``: the shapes of commands and events, in QEMU's terms.

As in QEMU's schema, the name of a type that is not built in is a number.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from pyqmigrate.qapi import types as qapi
from pyqmigrate.qapi.capabilities import capability_status
from pyqmigrate.qapi.parameters import parameters_shape
from pyqmigrate.qapi.qemu_version import QemuVersion
from pyqmigrate.qapi.status import RunState, Status
from pyqmigrate.qapi.types import optional

__all__ = ["schema_of"]


def schema_of(qemu: QemuVersion, commands: Mapping[str, qapi.Struct]) -> list[dict[str, object]]:
    """Return the schema of ``commands``, by name with their arguments, and of all events."""
    returned, schema = _returned(qemu), _Schema()
    for name, arguments in commands.items():
        schema.add_command(name, arguments, returned.get(name, _NOTHING))
    for name, data in _events(qemu).items():
        schema.add_event(name, data)
    return schema.entries


class _Schema:
    """The entries so far. A shape that is the same object is described once."""

    def __init__(self) -> None:
        self.entries: list[dict[str, object]] = []
        self._names: dict[int, str] = {}
        self._kept: list[qapi.Shape] = []  # so that no other shape gets the id of one
        self._built_in: set[str] = set()

    def add_command(self, name: str, arguments: qapi.Struct, returned: qapi.Shape) -> None:
        types = {"arg-type": self._type(arguments), "ret-type": self._type(returned)}
        self.entries.append({"name": name, "meta-type": "command", **types})

    def add_event(self, name: str, data: qapi.Struct) -> None:
        data_type = self._type(data)
        self.entries.append({"name": name, "meta-type": "event", "arg-type": data_type})

    def _type(self, shape: qapi.Shape) -> str:
        """Return the name of a shape's type, described the first time."""
        built_in = qapi.built_in(shape)
        if built_in is not None:
            name, json_type = built_in
            if name not in self._built_in:
                self._built_in.add(name)
                self.entries.append({"name": name, "meta-type": "builtin", "json-type": json_type})
            return name
        if id(shape) not in self._names:
            self._kept.append(shape)
            name = str(len(self._names))
            if isinstance(shape, qapi.ListOf):
                name = f"[{self._type(shape.shape)}]"
            self._names[id(shape)] = name
            if not any(entry["name"] == name for entry in self.entries):
                self.entries.append({"name": name, **self._description(shape)})
        return self._names[id(shape)]

    def _description(self, shape: qapi.Shape) -> dict[str, object]:
        if isinstance(shape, qapi.ListOf):
            return {"meta-type": "array", "element-type": self._type(shape.shape)}
        if isinstance(shape, qapi.Words):
            members = [{"name": word} for word in shape.words]
            return {"meta-type": "enum", "members": members, "values": list(shape.words)}
        if isinstance(shape, qapi.Struct):
            described: dict[str, object] = {
                "meta-type": "object",
                "members": [self._member(name, member) for name, member in shape.members.items()],
            }
            if shape.tag:
                described["tag"] = shape.tag
                described["variants"] = [
                    {"case": case, "type": self._type(branch)}
                    for case, branch in shape.branches.items()
                ]
            return described
        types = [self._type(qapi.STR), self._type(qapi.NULL)]  # the only one of its kind
        return {"meta-type": "alternate", "members": [{"type": name} for name in types]}

    def _member(self, name: str, shape: qapi.Shape) -> dict[str, object]:
        required = qapi.required(shape)
        member: dict[str, object] = {"name": name, "type": self._type(required)}
        return member if required is shape else {**member, "default": None}


_NOTHING = qapi.Struct({})
_NAMES = qapi.ListOf(qapi.Struct({"name": qapi.STR}))
_FEATURES = optional(qapi.ListOf(qapi.STR))
_INFO = qapi.Struct(
    {
        "name": qapi.STR,
        "meta-type": qapi.Words(
            ("builtin", "enum", "array", "object", "alternate", "command", "event")
        ),
        "features": _FEATURES,
    },
    "meta-type",
    {
        "builtin": qapi.Struct(
            {
                "json-type": qapi.Words(
                    ("string", "number", "int", "boolean", "null", "object", "array", "value")
                )
            }
        ),
        "enum": qapi.Struct(
            {
                "members": qapi.ListOf(qapi.Struct({"name": qapi.STR, "features": _FEATURES})),
                "values": qapi.ListOf(qapi.STR),
            }
        ),
        "array": qapi.Struct({"element-type": qapi.STR}),
        "object": qapi.Struct(
            {
                "members": qapi.ListOf(
                    qapi.Struct(
                        {
                            "name": qapi.STR,
                            "type": qapi.STR,
                            "default": optional(qapi.ANY),
                            "features": _FEATURES,
                        }
                    )
                ),
                "tag": optional(qapi.STR),
                "variants": optional(
                    qapi.ListOf(qapi.Struct({"case": qapi.STR, "type": qapi.STR}))
                ),
            }
        ),
        "alternate": qapi.Struct({"members": qapi.ListOf(qapi.Struct({"type": qapi.STR}))}),
        "command": qapi.Struct(
            {"arg-type": qapi.STR, "ret-type": qapi.STR, "allow-oob": optional(qapi.BOOL)}
        ),
        "event": qapi.Struct({"arg-type": qapi.STR}),
    },
)
_RAM = qapi.Struct(
    {
        "transferred": qapi.INT,
        "remaining": qapi.INT,
        "total": qapi.INT,
        "duplicate": qapi.INT,
        "normal": qapi.INT,
        "normal-bytes": qapi.INT,
        "dirty-pages-rate": qapi.INT,
        "mbps": qapi.NUMBER,
        "dirty-sync-count": qapi.INT,
        "postcopy-requests": qapi.INT,
        "page-size": qapi.INT,
        "multifd-bytes": qapi.INT,
        "pages-per-second": qapi.INT,
        "precopy-bytes": qapi.INT,
        "downtime-bytes": qapi.INT,
        "postcopy-bytes": qapi.INT,
        "dirty-sync-missed-zero-copy": qapi.INT,
    }
)


def _returned(qemu: QemuVersion) -> dict[str, qapi.Shape]:
    """Return the results of the commands that return more than an empty object."""
    fdset = {
        "fdset-id": qapi.INT,
        "fds": qapi.ListOf(qapi.Struct({"fd": qapi.INT, "opaque": optional(qapi.STR)})),
    }
    numbers = qapi.Struct({"major": qapi.INT, "minor": qapi.INT, "micro": qapi.INT})
    state = qapi.Struct({"running": qapi.BOOL, "status": qapi.Words(tuple(RunState))})
    return {
        "add-fd": qapi.Struct({"fdset-id": qapi.INT, "fd": qapi.INT}),
        "human-monitor-command": qapi.STR,
        "query-commands": _NAMES,
        "query-fdsets": qapi.ListOf(qapi.Struct(fdset)),
        "query-memory-size-summary": qapi.Struct(
            {"base-memory": qapi.INT, "plugged-memory": optional(qapi.INT)}
        ),
        "query-migrate": _migration(qemu),
        "query-migrate-capabilities": qapi.ListOf(capability_status(qemu)),
        "query-migrate-parameters": _parameters(qemu),
        "query-name": qapi.Struct({"name": optional(qapi.STR)}),
        "query-qmp-schema": qapi.ListOf(_INFO),
        "query-status": state,
        "query-uuid": qapi.Struct({"UUID": qapi.STR}),
        "query-version": qapi.Struct({"qemu": numbers, "package": qapi.STR}),
    }


def _parameters(qemu: QemuVersion) -> qapi.Struct:
    shape = parameters_shape(qemu)
    if qemu.returns_str_or_null:
        return shape
    texts = {
        name: optional(qapi.STR)
        for name, member in shape.members.items()
        if qapi.required(member) is qapi.STR_OR_NULL
    }
    return qapi.Struct({**shape.members, **texts})


def _migration(qemu: QemuVersion) -> qapi.Struct:
    members: dict[str, qapi.Shape] = {
        "status": _statuses(qemu),
        "ram": _RAM,
        "total-time": qapi.INT,
        "setup-time": qapi.INT,
        "expected-downtime": qapi.INT,
        "downtime": qapi.INT,
        "error-desc": qapi.STR,
    }
    if qemu.total_remaining:
        members["remaining"] = qapi.INT
    return qapi.Struct({name: optional(shape) for name, shape in members.items()})


@functools.cache
def _statuses(qemu: QemuVersion) -> qapi.Words:
    return qapi.Words(tuple(status for status in Status if qemu.has(status)))


def _events(qemu: QemuVersion) -> dict[str, qapi.Struct]:
    return {
        "MIGRATION": qapi.Struct({"status": _statuses(qemu)}),
        "MIGRATION_PASS": qapi.Struct({"pass": qapi.INT}),
        "RESUME": _NOTHING,
        "SHUTDOWN": qapi.Struct({"guest": qapi.BOOL, "reason": qapi.Words(("host-qmp-quit",))}),
        "STOP": _NOTHING,
    }
