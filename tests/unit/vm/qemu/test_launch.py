"""A QEMU that does not start is ended, even if its start is cancelled."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import cast

import pytest

from pyqmigrate.vm.qemu.launch import answered
from pyqmigrate.vm.qemu.spawn import QemuProcess


class NeverStarted:
    """A process whose monitor is closed, and whose last words take a while."""

    def __init__(self) -> None:
        self.monitor, other = socket.socketpair()
        other.close()
        self.asked, self.may_speak = threading.Event(), threading.Event()
        self.ended = 0

    def describe(self, what: str) -> str:
        self.asked.set()
        self.may_speak.wait(10)
        return what

    def end(self) -> None:
        self.ended += 1
        self.monitor.close()


def test_a_process_that_failed_is_ended_although_its_start_is_cancelled() -> None:
    started = NeverStarted()

    async def run() -> None:
        task = asyncio.create_task(answered(cast(QemuProcess, started)))
        await asyncio.to_thread(started.asked.wait, 10)
        task.cancel()
        asyncio.get_running_loop().call_later(0.05, started.may_speak.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert started.ended == 1
