"""Capabilities and parameters of a migration: QEMU's names, types, ranges and cross-checks.

Both are immutable values. ``merge`` returns a new one with all changes made, or raises and
leaves everything as it was::

    capabilities = Capabilities().merge({"mapped-ram": True, "multifd": True})
    parameters = Parameters().merge({"multifd-channels": 8}, capabilities=capabilities)

How much is refused beyond what QEMU refuses is a :class:`Policy`.
"""

from pyqmigrate.options.capabilities import CAPABILITY_NAMES, Capabilities
from pyqmigrate.options.parameters import (
    MigrationMode,
    MultifdCompression,
    Parameters,
    ZeroPageDetection,
)
from pyqmigrate.options.policy import Policy

__all__ = [
    "CAPABILITY_NAMES",
    "Capabilities",
    "MigrationMode",
    "MultifdCompression",
    "Parameters",
    "Policy",
    "ZeroPageDetection",
]
