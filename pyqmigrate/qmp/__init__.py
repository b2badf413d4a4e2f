"""A QMP server that real clients can drive, in front of a migration and its fdsets.

Embed :class:`QmpServer` in an asyncio program. What it needs of the migration is
:class:`MigrationBackend`.
"""

from pyqmigrate.qapi.event import Event
from pyqmigrate.qmp.backend import MigrationBackend
from pyqmigrate.qmp.commands import Version
from pyqmigrate.qmp.server import QmpServer

__all__ = ["Event", "MigrationBackend", "QmpServer", "Version"]
