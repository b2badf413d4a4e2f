"""The former name of ``pyqmigrate.snapshot.save.sequential``; it will go."""

import importlib
import sys

sys.modules[__name__] = importlib.import_module("pyqmigrate.snapshot.save.sequential")
