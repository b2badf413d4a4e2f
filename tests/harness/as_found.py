"""Prove that a save left a writing guest as it found it.

found = AsFound(guest, directory)
...                                # a save that fails
found.check(within=20)
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tests.harness.writing_guest import WritingGuest

__all__ = ["AsFound"]


class AsFound:
    """The state of a guest and of the directory that it is saved in, when this was made."""

    def __init__(self, guest: WritingGuest, directory: Path) -> None:
        self._guest, self._directory = guest, directory
        self._before = self._state()
        self._files = self._names()

    def check(self, *, within: float = 20, files: Collection[str] = ()) -> None:
        """AssertionError unless all is as before within so many seconds, but for new ``files``.

        The longest time is for a guardian that is at work.
        """
        deadline = time.monotonic() + within
        while difference := self._difference(files):
            assert time.monotonic() < deadline, difference
            time.sleep(0.02)
        if self._before[2] == "running":
            self._guest.wait_until_running()
        self._guest.assert_memory_held()

    def _difference(self, files: Collection[str]) -> str:
        for before, now in zip(self._before, self._state(), strict=True):
            if before != now:
                return f"now {now}, before {before}"
        if left := self._names() - self._files - set(files):
            return f"stray files: {sorted(left)}"
        if guardians := self._guardians():
            return f"guardian processes are left: {guardians}"
        return ""

    def _state(self) -> tuple[Any, ...]:
        execute = self._guest.execute
        return (
            execute("query-migrate-capabilities"),
            execute("query-migrate-parameters"),
            execute("query-status")["status"],
            execute("query-fdsets"),
        )

    def _names(self) -> set[str]:
        return {path.name for path in self._directory.iterdir()}

    def _guardians(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                ours = any(word.startswith(os.fsencode(self._directory)) for word in words)
                if ours and any(word.endswith(b"/guardian.py") for word in words):
                    found.append(int(entry.name))
        return found
