"""A real QEMU that saves and loads sequential streams: ``file:`` without mapped-ram."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.harness.machine import Mode, Qemu

__all__ = ["SequentialQemu"]

_SLOW = 24 << 20  # bytes a second: a running guest changes its pages faster than they are saved


class SequentialQemu(Qemu):
    """As Qemu, without mapped-ram; with ``xbzrle`` set it writes what changed in a page."""

    xbzrle = False

    def save_in_rounds(self, path: Path, rounds: int, *, limit: float = 60) -> dict[str, Any]:
        """Save so slowly that the guest changes what was saved, then finish.

        Returns the last ``query-migrate``.
        """
        deadline = time.monotonic() + limit
        self.start_save(path, Mode(), bandwidth=_SLOW)
        while True:
            state = self.execute("query-migrate")
            assert state["status"] in ("setup", "active"), state
            if state.get("ram", {}).get("dirty-sync-count", 0) > rounds:
                break
            assert time.monotonic() < deadline, state
            time.sleep(0.02)
        self.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 2000})
        return self._finish(Mode(), limit)

    def _configure(self, mode: Mode, bandwidth: int = 0) -> None:
        self.set_capabilities({"events": True, "mapped-ram": False, "xbzrle": self.xbzrle})
        self.execute(
            "migrate-set-parameters",
            {"zero-page-detection": mode.zero_pages, "max-bandwidth": bandwidth},
        )
