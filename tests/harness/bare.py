"""A QEMU under TCG with a command line of the test's own."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar

from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.machine import BINARY

__all__ = ["BareQemu"]

T = TypeVar("T")


class BareQemu:
    """``qemu-system-x86_64 ARGUMENTS`` with a monitor at ``socket``; killed on exit.

    The guest is stopped before its first instruction unless ``run`` is true. ``before`` comes
    before the program's name (``unshare``, ...), ``socket`` may be anywhere; ``monitor`` replaces
    the option that makes the monitor.
    """

    def __init__(
        self,
        *arguments: str,
        run: bool = False,
        before: Sequence[str] = (),
        socket: Path | None = None,
        monitor: Sequence[str] = (),
        fds: Sequence[int] = (),
        cwd: Path | None = None,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="qemu-")
        self.directory = Path(self._directory.name)
        self.socket = socket or self.directory / "qmp.sock"
        self._stderr = self.directory / "stderr"
        command = [
            *before,
            BINARY,
            "-accel",
            "tcg",
            "-nodefaults",
            "-display",
            "none",
            *(monitor or ("-qmp", f"unix:{self.socket},server=on,wait=off")),
            *([] if run else ["-S"]),
            *arguments,
        ]
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=fds,
                cwd=cwd,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._directory.cleanup()

    def run_state(self) -> str:
        return str(self.run(lambda monitor: monitor.execute("query-status"))["status"])

    def kill(self) -> None:
        """End it and what was started before it (its own session)."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    async def connect(self) -> Monitor:
        """A session, as soon as the monitor listens."""
        deadline = time.monotonic() + 30
        while True:
            try:
                return await Monitor.connect(self.socket)
            except RuntimeError:
                assert self.process.poll() is None, self.stderr()
                assert time.monotonic() < deadline, self.stderr()
                await asyncio.sleep(0.02)

    def run(self, task: Callable[[Monitor], Awaitable[T]]) -> T:
        """What ``task`` makes of a session of its own."""

        async def session() -> T:
            async with await self.connect() as monitor:
                return await task(monitor)

        return asyncio.run(session())
