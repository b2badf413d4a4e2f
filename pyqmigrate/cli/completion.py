"""Completion in bash and zsh, by argcomplete.

The shell runs the command with ``_ARGCOMPLETE`` set, and reads the completions from descriptor 8.
Only the verb on the command line is imported.
"""

from __future__ import annotations

import os

from pyqmigrate.cli.arguments import Parser
from pyqmigrate.cli.exit_codes import ExitCode

__all__ = ["REQUEST", "complete"]

REQUEST = "_ARGCOMPLETE"  # the environment variable that asks for completions


def complete(parser: Parser) -> ExitCode:
    """Write the completions of the command line in ``COMP_LINE``, and end the process.

    Returns only without a completion: if argcomplete is missing, or after ``--``, where the shell
    completes file names.
    """
    try:
        import argcomplete
    except ImportError:
        return ExitCode.NOT_SUPPORTED
    words = _words_before_cursor()
    if "--" in words:
        return ExitCode.DONE
    parser.load_verbs(words, nested=True)
    argcomplete.autocomplete(parser, always_complete_options=False)
    return ExitCode.DONE


def _words_before_cursor() -> list[str]:
    """Return the arguments before the word to complete."""
    line = (
        os.environ["COMP_LINE"].encode()[: int(os.environ["COMP_POINT"])].decode("utf-8", "replace")
    )
    words = line.split()
    if not line[-1:].isspace():
        words = words[:-1]
    return words[int(os.environ[REQUEST]) :]  # 1: pyqmigrate; 3: python -m pyqmigrate
