"""Found and imported by volatility3 among its plugins: makes it open snapshots."""

import pyqmigrate.integrations.volatility3  # noqa: F401
