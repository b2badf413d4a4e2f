"""The former name of ``pyqmigrate.integrity.seal``; it will go."""

import importlib
import sys

sys.modules[__name__] = importlib.import_module("pyqmigrate.integrity.seal")
