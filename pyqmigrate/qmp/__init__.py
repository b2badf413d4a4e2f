"""A QMP server for real clients, in front of a migration and its fdsets.

Embed :class:`QmpServer` in an asyncio program; :class:`MigrationBackend` is what it needs of the
migration.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqmigrate.qapi.event import Event
    from pyqmigrate.qmp.backend import MigrationBackend
    from pyqmigrate.qmp.client import QmpClient
    from pyqmigrate.qmp.commands import Version
    from pyqmigrate.qmp.server import QmpServer

__all__ = ["Event", "MigrationBackend", "QmpClient", "QmpServer", "Version"]

# Imported on first use: the client needs neither asyncio nor the server.
_HOME = {
    "Event": "pyqmigrate.qapi.event",
    "MigrationBackend": "pyqmigrate.qmp.backend",
    "QmpClient": "pyqmigrate.qmp.client",
    "QmpServer": "pyqmigrate.qmp.server",
    "Version": "pyqmigrate.qmp.commands",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
