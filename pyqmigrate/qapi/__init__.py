"""QEMU's vocabulary: capabilities, parameters, addresses, statuses and events of a migration.

Capabilities and parameters are immutable values. ``merge`` returns a new one with all changes made,
or raises and leaves everything as it was::

    capabilities = Capabilities().merge({"mapped-ram": True, "multifd": True})
    parameters = Parameters().merge({"multifd-channels": 8}, capabilities=capabilities)

How much is refused beyond what QEMU refuses is a :class:`~pyqmigrate.qapi.policy.Policy`.
"""
