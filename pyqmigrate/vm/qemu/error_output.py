"""Standard error of a QEMU that was started: kept for error messages, later passed on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from typing import IO

from pyqmigrate.io.threads import start_thread

__all__ = ["LAST_WORDS", "ErrorOutput", "Stream"]

Stream = int | IO[bytes] | None
_KEPT = 1 << 16  # bytes of standard error kept for error messages
LAST_WORDS = 0.2  # seconds to wait for QEMU's last lines


class ErrorOutput:
    """Standard error of a process: kept at first, later passed on to ``target``."""

    def __init__(self, target: Stream) -> None:
        self._stream = target
        self._target = _descriptor(target)
        self._kept: bytearray | None = bytearray()
        self._lock = threading.Lock()
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._pump, name="pyqmigrate-stderr", daemon=True)
        try:
            start_thread(self._thread)
        except BaseException:
            for fd in (self._reader, self._target, self.writer):
                os.close(fd)
            raise

    def close_writer(self) -> None:
        """Close the end that the process inherited."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def text(self) -> str:
        with self._lock:
            return (self._kept or b"").decode("utf-8", "replace").strip()

    def hand_over(self) -> None:
        with self._lock:
            kept, self._kept = self._kept, None
            if not kept:
                return
            if self._target >= 0:
                self._write(bytes(kept))
                return
            self._target = _descriptor(self._stream)  # the process has ended
            self._write(bytes(kept))
            self._close_target()

    def join(self, timeout: float = LAST_WORDS) -> None:
        """Wait until the process has closed it."""
        self._thread.join(timeout)

    def _pump(self) -> None:
        try:
            while data := os.read(self._reader, 65536):
                with self._lock:
                    if self._kept is None:
                        self._write(data)
                    else:
                        self._kept += data
                        del self._kept[:-_KEPT]
        finally:
            os.close(self._reader)
            with self._lock:
                self._close_target()

    def _close_target(self) -> None:
        os.close(self._target)
        self._target = -1

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # without a reader; QEMU goes on
            while data:
                data = data[os.write(self._target, data) :]


def _descriptor(target: Stream) -> int:
    """Return a new descriptor that writes to ``target``."""
    if target == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    number = 2 if target is None else target if isinstance(target, int) else target.fileno()
    try:
        return os.dup(number)
    except OSError:  # a process without standard error
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
