"""Outgoing and incoming migration to and from files: states, passes, statistics, events.

A program that has guest memory and devices of its own (a VMM, a test-bed for managers) makes one
:class:`Migration` and drives it directly, or puts a QMP server in front of it::

    migration = Migration([RamBlock("pc.ram", memory)], guest=MyGuest())
    migration.set_capabilities({"mapped-ram": True, "multifd": True})
    migration.migrate(parse_uri("file:/snap/guest.mapped"))
    info = migration.wait()
"""

from pyqmigrate.migration.guest import Guest
from pyqmigrate.migration.machine import Migration

__all__ = ["Guest", "Migration"]
