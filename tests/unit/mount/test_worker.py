"""Whether a worker has ended is seen also while one of its threads cannot."""

from __future__ import annotations

import subprocess
import sys
import time

from pyqmigrate.mount.worker import is_half_ended

# The first thread ends; the other one sleeps in the kernel.
HALF = """
import ctypes, os, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
os.write(1, b"x")
ctypes.CDLL(None).pthread_exit(None)
"""


def test_process_whose_first_thread_has_ended_is_half_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", HALF], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.read(1) == b"x"
            deadline = time.monotonic() + 10
            while not is_half_ended(process.pid):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert process.poll() is None
        finally:
            process.kill()
    assert not is_half_ended(process.pid)


def test_living_process_is_not_half_ended() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            assert not is_half_ended(process.pid)
        finally:
            process.kill()
