"""The options ``--verbose``, ``--quiet`` and ``--no-progress``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from pyqmigrate.cli.progress import hidden

__all__ = ["configured"]


@contextlib.contextmanager
def configured(args: argparse.Namespace) -> Iterator[None]:
    """Log to standard error, and show or hide progress, within the block."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(hidden(args.quiet or args.no_progress))
        if args.verbose and sys.stderr is not None:
            stack.enter_context(_logging())
        yield


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    import logging

    from pyqmigrate.log import logger

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
