"""Connections that QEMU has for recoveries, passed ahead: ``getfd`` is not an out-of-band command."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from pyqmigrate.vm.incoming.keeper.loop import Loop
from pyqmigrate.vm.incoming.keeper.monitor import KeeperMonitor

__all__ = ["RETRY", "Recoveries"]

RETRY = 0.01  # seconds between attempts to recover
_RETRY_MAX = 1.0
_SPARES = 8  # connections that QEMU has: each recovery uses one


class Recoveries:
    """Has QEMU take new connections. ``note`` is called with what goes wrong; ``refused`` when QEMU does not
    take a connection yet: it notices the loss of the former when it uses it next, or has completed."""

    def __init__(
        self, loop: Loop, note: Callable[[str], None], refused: Callable[[], bool]
    ) -> None:
        """``refused`` returns whether to try again."""
        self._loop, self._note, self._refused = loop, note, refused
        self._monitor: KeeperMonitor | None = None
        self._spares: list[tuple[str, socket.socket]] = []
        self._passing = False
        self._names = 0

    def use(self, monitor: KeeperMonitor | None) -> None:
        """Use a monitor from now on; None if it is lost."""
        self._monitor = monitor
        self.refill()

    def refill(self) -> None:
        """Give QEMU connections for later recoveries."""
        monitor = self._monitor
        if self._passing or monitor is None or len(self._spares) >= _SPARES:
            return
        ours, theirs = socket.socketpair()
        self._names += 1
        name = f"pyqmigrate-lazy-{self._names}"
        self._passing = True

        def answer(reply: dict[str, Any]) -> None:
            self._passing = False
            if "return" in reply:
                self._spares.append((name, ours))
                self.refill()
            else:
                ours.close()
                self._note(f"QEMU takes no connection for a recovery: {reply['error'].get('desc')}")

        with theirs:
            monitor.pass_fd(theirs.fileno(), name, answer)

    def take(self) -> tuple[str, socket.socket] | None:
        """Return a connection that QEMU has, by its name there, and this end; None if it has none yet."""
        if self._spares:
            return self._spares.pop(0)
        self.refill()
        return None

    def recover(self, name: str, pause: float = RETRY) -> None:
        """Have QEMU take the connection ``name``, as soon as it has noticed the loss of the former."""
        if self._monitor is None:
            return

        def answer(reply: dict[str, Any]) -> None:
            if "return" in reply:
                self.refill()
            elif self._refused():
                longer = min(2 * pause, _RETRY_MAX)
                self._loop.later(pause, lambda: self.recover(name, longer))

        self._monitor.execute("migrate-recover", {"uri": f"fd:{name}"}, answer, oob=True)
