# PYTHON_ARGCOMPLETE_OK
"""``python -m pyqmigrate`` is the command ``pyqmigrate``."""

import sys

from pyqmigrate.cli import main

sys.exit(main())
