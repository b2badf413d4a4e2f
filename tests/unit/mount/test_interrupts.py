"""Readers that are killed get their answer; others wait."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pyqmigrate.mount.interrupts import Interrupts, is_dying
from pyqmigrate.mount.protocol import RESENT


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_process_is_dying_once_it_is_killed(process: subprocess.Popen[bytes]) -> None:
    assert not is_dying(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_dying(process.pid)  # a zombie
    process.wait()
    assert is_dying(process.pid)


def test_stopped_and_unknown_threads_are_alive(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    assert not is_dying(process.pid)
    assert not is_dying(0)
    assert not is_dying(os.getpid())


def test_request_is_given_up_when_its_process_dies(process: subprocess.Popen[bytes]) -> None:
    given_up: queue.Queue[int] = queue.Queue()
    interrupts = Interrupts(given_up.put)
    interrupts.begin(RESENT | 10, process.pid)
    assert interrupts.interrupt(10)
    time.sleep(0.3)
    assert given_up.empty()  # a signal that does not kill
    process.kill()
    assert given_up.get(timeout=10) == RESENT | 10
    interrupts.end(RESENT | 10)


def test_request_that_was_answered_is_not_given_up(process: subprocess.Popen[bytes]) -> None:
    given_up: queue.Queue[int] = queue.Queue()
    interrupts = Interrupts(given_up.put)
    interrupts.begin(10, process.pid)
    assert interrupts.interrupt(10)
    interrupts.end(10)
    process.kill()
    time.sleep(0.3)
    assert given_up.empty()
    assert not interrupts.interrupt(10)
