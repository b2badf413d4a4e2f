"""A QMP server for real clients, in front of a migration and its fdsets.

Embed :class:`QmpServer` in an asyncio program; :class:`MigrationBackend` is what it needs of the
migration.
"""

from typing import TYPE_CHECKING

from pyqmigrate import lazy_names

if TYPE_CHECKING:
    from pyqmigrate.qapi.event import Event
    from pyqmigrate.qmp.backend import MigrationBackend
    from pyqmigrate.qmp.client import QmpClient
    from pyqmigrate.qmp.commands import Version
    from pyqmigrate.qmp.server import QmpServer

__all__ = ["Event", "MigrationBackend", "QmpClient", "QmpServer", "Version"]

# Imported on first use: the client needs neither asyncio nor the server.
_HOME = {
    "Event": ".qapi.event",
    "MigrationBackend": "backend",
    "QmpClient": "client",
    "QmpServer": "server",
    "Version": "commands",
}

__getattr__, __dir__ = lazy_names(__name__, _HOME, globals())
