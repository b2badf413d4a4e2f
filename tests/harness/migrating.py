"""A migration driven over QMP, to its end."""

from __future__ import annotations

import time

from pyqmigrate.qmp.client import QmpClient

__all__ = ["migrate"]


def migrate(qmp: QmpClient, command: str, uri: str, *, mapped: bool) -> None:
    """Run ``migrate`` or ``migrate-incoming`` and wait until it has completed."""
    state = {"capability": "mapped-ram", "state": mapped}
    qmp.execute("migrate-set-capabilities", {"capabilities": [state]})
    qmp.execute("migrate-set-parameters", {"max-bandwidth": 0})
    qmp.execute(command, {"uri": uri})
    deadline = time.monotonic() + 60
    while (answer := qmp.execute("query-migrate"))["status"] != "completed":
        assert answer["status"] not in ("failed", "cancelled"), answer
        assert time.monotonic() < deadline, answer
        time.sleep(0.01)
