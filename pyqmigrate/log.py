"""The logger of the package, ``pyqmigrate``: silent unless the program configures it."""

from __future__ import annotations

import logging

__all__ = ["logger"]

logger = logging.getLogger("pyqmigrate")
logger.addHandler(logging.NullHandler())
