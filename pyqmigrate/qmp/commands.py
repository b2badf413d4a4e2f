"""The commands of the monitor: their arguments' shapes, and what each does.

There is one table for each imitated QEMU; ``query-commands`` and the dispatcher both use it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

from pyqmigrate.migration.fdset import FdSets
from pyqmigrate.qapi import types as qapi
from pyqmigrate.qapi.address import channels_shape, parse_address
from pyqmigrate.qapi.capabilities import capability_status
from pyqmigrate.qapi.parameters import parameters_shape
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qapi.qemu_version import QemuVersion
from pyqmigrate.qapi.status import RunState, Status
from pyqmigrate.qmp import hmp
from pyqmigrate.qmp.backend import MigrationBackend
from pyqmigrate.qmp.descriptors import NamedFds, PendingFds
from pyqmigrate.qmp.schema import schema_of

__all__ = ["Command", "Context", "Version", "commands_of"]


class Version(NamedTuple):
    """The version that the server announces."""

    major: int
    minor: int
    micro: int
    package: str = ""

    def to_json(self) -> dict[str, object]:
        """Return what query-version returns."""
        numbers = {"micro": self.micro, "minor": self.minor, "major": self.major}
        return {"qemu": numbers, "package": self.package}


@dataclass(frozen=True, slots=True)
class Context:
    """The objects that commands use. ``pending`` is the connection's, the rest the server's.

    ``quit`` asks the server to end, and returns at once.
    """

    migration: MigrationBackend
    fdsets: FdSets
    names: NamedFds
    pending: PendingFds
    version: Version
    quit: Callable[[], None]
    policy: Policy = Policy.STRICT

    @property
    def commands(self) -> dict[str, Command]:
        """Every command by its name."""
        return commands_of(self.policy.qemu)


@dataclass(frozen=True, slots=True)
class Command:
    """A command; ``run`` gets checked arguments and returns JSON, on a thread if it may block."""

    arguments: qapi.Struct
    run: Callable[[Context, dict[str, Any]], object]
    blocks: bool = False


def _query_version(context: Context, _: dict[str, Any]) -> object:
    return context.version.to_json()


def _query_commands(context: Context, _: dict[str, Any]) -> object:
    return [{"name": name} for name in context.commands]


def _query_status(context: Context, _: dict[str, Any]) -> object:
    state = context.migration.run_state
    return {"status": state, "running": state is RunState.RUNNING}


def _stop(context: Context, _: dict[str, Any]) -> object:
    context.migration.stop()
    return {}


def _cont(context: Context, _: dict[str, Any]) -> object:
    context.migration.cont()
    return {}


def _quit(context: Context, _: dict[str, Any]) -> object:
    context.quit()
    return {}


def _add_fd(context: Context, arguments: dict[str, Any]) -> object:
    fd = context.pending.take()
    try:
        added = context.fdsets.add(fd, arguments.get("fdset-id"), arguments.get("opaque"))
    except BaseException:
        os.close(fd)
        raise
    return {"fd": added.fd, "fdset-id": added.fdset_id}


def _remove_fd(context: Context, arguments: dict[str, Any]) -> object:
    context.fdsets.remove(arguments["fdset-id"], arguments.get("fd"))
    return {}


def _query_fdsets(context: Context, _: dict[str, Any]) -> object:
    return [
        {
            "fds": [
                {"fd": fd} if opaque is None else {"fd": fd, "opaque": opaque}
                for fd, opaque in fdset.fds
            ],
            "fdset-id": fdset.fdset_id,
        }
        for fdset in context.fdsets.query()
    ]


def _getfd(context: Context, arguments: dict[str, Any]) -> object:
    context.names.add(arguments["fdname"], context.pending.take())
    return {}


def _closefd(context: Context, arguments: dict[str, Any]) -> object:
    context.names.close(arguments["fdname"])
    return {}


def _migrate(context: Context, arguments: dict[str, Any]) -> object:
    address = parse_address(arguments.get("uri"), arguments.get("channels"))
    context.migration.migrate(
        address, resume=arguments.get("resume", False), take_fd=context.names.take
    )
    return {}


def _migrate_incoming(context: Context, arguments: dict[str, Any]) -> object:
    context.migration.check_incoming_allowed()
    address = parse_address(arguments.get("uri"), arguments.get("channels"), incoming=True)
    context.migration.migrate_incoming(
        address, exit_on_error=arguments.get("exit-on-error", True), take_fd=context.names.take
    )
    return {}


def _migrate_cancel(context: Context, _: dict[str, Any]) -> object:
    context.migration.cancel()
    return {}


def _migrate_continue(context: Context, arguments: dict[str, Any]) -> object:
    context.migration.migrate_continue(arguments["state"])
    return {}


def _query_migrate(context: Context, _: dict[str, Any]) -> object:
    info = context.migration.query()
    return info.to_json(total_remaining=context.policy.qemu.total_remaining)


def _query_capabilities(context: Context, _: dict[str, Any]) -> object:
    return context.migration.capabilities.to_json(context.policy)


def _set_capabilities(context: Context, arguments: dict[str, Any]) -> object:
    context.migration.set_capabilities(
        {entry["capability"]: entry["state"] for entry in arguments["capabilities"]}
    )
    return {}


def _query_parameters(context: Context, _: dict[str, Any]) -> object:
    return context.migration.parameters.to_json(context.policy)


def _set_parameters(context: Context, arguments: dict[str, Any]) -> object:
    context.migration.set_parameters(arguments)
    return {}


def _query_memory(context: Context, _: dict[str, Any]) -> object:
    return {"base-memory": context.migration.memory_size(), "plugged-memory": 0}


def _query_uuid(context: Context, _: dict[str, Any]) -> object:
    return {"UUID": str(context.migration.uuid or UUID(int=0))}


def _query_schema(context: Context, _: dict[str, Any]) -> object:
    arguments = {name: command.arguments for name, command in context.commands.items()}
    return schema_of(context.policy.qemu, arguments)


def _human_monitor_command(context: Context, arguments: dict[str, Any]) -> object:
    line = arguments["command-line"]
    human = hmp.Human(context.migration, context.names.take, context.quit, context.policy.qemu)
    return hmp.run(line, human)


def _shape(**members: qapi.Shape) -> qapi.Struct:
    return qapi.Struct({name.replace("_", "-"): shape for name, shape in members.items()})


_NOTHING = _shape()
_URI = qapi.optional(qapi.STR)
_BOOL = qapi.optional(qapi.BOOL)


@functools.cache
def commands_of(qemu: QemuVersion) -> dict[str, Command]:
    """Return every command by name."""
    statuses = tuple(status for status in Status if qemu.has(status))
    channels = qapi.optional(channels_shape(qemu.lacks))
    detach = {"detach": _BOOL} if qemu.detach else {}
    return {
        "add-fd": Command(
            _shape(fdset_id=qapi.optional(qapi.INT), opaque=qapi.optional(qapi.STR)), _add_fd
        ),
        "closefd": Command(_shape(fdname=qapi.STR), _closefd),
        "cont": Command(_NOTHING, _cont, blocks=True),
        "getfd": Command(_shape(fdname=qapi.STR), _getfd),
        "human-monitor-command": Command(
            _shape(command_line=qapi.STR, cpu_index=qapi.optional(qapi.INT)),
            _human_monitor_command,
            blocks=True,
        ),
        "migrate": Command(
            _shape(uri=_URI, channels=channels, **detach, resume=_BOOL), _migrate, blocks=True
        ),
        "migrate-continue": Command(
            _shape(state=qapi.Words(statuses)), _migrate_continue, blocks=True
        ),
        "migrate-incoming": Command(
            _shape(uri=_URI, channels=channels, exit_on_error=_BOOL), _migrate_incoming, blocks=True
        ),
        "migrate-set-capabilities": Command(
            _shape(capabilities=qapi.ListOf(capability_status(qemu))), _set_capabilities
        ),
        "migrate-set-parameters": Command(parameters_shape(qemu), _set_parameters),
        "migrate_cancel": Command(_NOTHING, _migrate_cancel),
        # The session itself negotiates, and answers this one however late it comes.
        "qmp_capabilities": Command(_NOTHING, lambda _context, _: {}),
        "query-commands": Command(_NOTHING, _query_commands),
        "query-fdsets": Command(_NOTHING, _query_fdsets),
        "query-memory-size-summary": Command(_NOTHING, _query_memory),
        "query-migrate": Command(_NOTHING, _query_migrate),
        "query-migrate-capabilities": Command(_NOTHING, _query_capabilities),
        "query-migrate-parameters": Command(_NOTHING, _query_parameters),
        "query-name": Command(_NOTHING, lambda _context, _: {}),
        "query-qmp-schema": Command(_NOTHING, _query_schema),
        "query-status": Command(_NOTHING, _query_status),
        "query-uuid": Command(_NOTHING, _query_uuid),
        "query-version": Command(_NOTHING, _query_version),
        "quit": Command(_NOTHING, _quit),
        "remove-fd": Command(
            _shape(fdset_id=qapi.INT, fd=qapi.optional(qapi.INT)), _remove_fd, blocks=True
        ),
        "stop": Command(_NOTHING, _stop, blocks=True),
    }
