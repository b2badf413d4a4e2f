"""A QMP server that real clients can drive, in front of a migration and its fdsets.

Embed :class:`QmpServer` in an asyncio program. What it needs of the migration is
:class:`MigrationBackend`.
"""

from pyqmigrate.events import Event
from pyqmigrate.monitor.backend import MigrationBackend
from pyqmigrate.monitor.commands import Version
from pyqmigrate.monitor.server import QmpServer

__all__ = ["Event", "MigrationBackend", "QmpServer", "Version"]
