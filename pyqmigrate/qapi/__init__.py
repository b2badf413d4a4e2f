"""Capabilities and parameters of a migration: QEMU's names, types, ranges and cross-checks.

Both are immutable values. ``merge`` returns a new one with all changes made, or raises and
leaves everything as it was::

    capabilities = Capabilities().merge({"mapped-ram": True, "multifd": True})
    parameters = Parameters().merge({"multifd-channels": 8}, capabilities=capabilities)

How much is refused beyond what QEMU refuses is a :class:`Policy`.
"""

from pyqmigrate.qapi.capabilities import CAPABILITY_NAMES, Capabilities
from pyqmigrate.qapi.parameters import (
    MigrationMode,
    MultifdCompression,
    Parameters,
    ZeroPageDetection,
)
from pyqmigrate.qapi.policy import Policy

__all__ = [
    "CAPABILITY_NAMES",
    "Capabilities",
    "MigrationMode",
    "MultifdCompression",
    "Parameters",
    "Policy",
    "ZeroPageDetection",
]
