# PYTHON_ARGCOMPLETE_OK
"""``python -m pyqmigrate`` is the command ``pyqmigrate``."""

import gc
import sys

# A guest waits for the imports of a restore: collecting as often as usual takes 5 ms of them, and finds nothing.
gc.set_threshold(50_000)

from pyqmigrate.cli import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
