"""The former name of ``pyqmigrate.integrity.seal`` and ``verify``; it will go."""

import importlib
import sys

_seal = importlib.import_module("pyqmigrate.integrity.seal")
_verify = importlib.import_module("pyqmigrate.integrity.verify")
for _name in _verify.__all__:
    setattr(_seal, _name, getattr(_verify, _name))
sys.modules[__name__] = _seal
