"""The former name of ``pyqmigrate.snapshot.detect``; it will go."""

import importlib
import sys

sys.modules[__name__] = importlib.import_module("pyqmigrate.snapshot.detect")
