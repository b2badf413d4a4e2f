"""A Dask scheduler and its workers on the loopback interface, each a process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Cluster", "dask_cluster"]

_STARTS_IN = 120.0  # seconds
_MAIN = "import sys; sys.path[:0] = {paths!r}; from distributed.cli.{program} import main; main()"
_SLOW = """
import os, signal, time
from pyqmigrate.fleet import task

perform = task.__dict__.setdefault("quick", task.perform)  # this is run more than once

def slow(work, target, *stop):
    if "deadly" in target.name:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep({seconds})
    return perform(work, target, *stop)

task.perform = slow
"""


class Cluster:
    """A scheduler at ``address``, and its workers by number. What they print is in files of ``where``.

    seconds: how much longer each task takes. A snapshot with ``deadly`` in its name kills its worker.
    failures: of its workers that the scheduler allows a task.
    """

    def __init__(self, where: Path, *, seconds: float, failures: int) -> None:
        self.where = where
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self._preload = where / "slow.py"
        self._preload.write_text(_SLOW.format(seconds=seconds))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{port}"
        self._environment = {
            **os.environ,
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(failures),
        }
        self.scheduler = self._start(
            "dask_scheduler", "scheduler", "--host=127.0.0.1", f"--port={port}", "--no-dashboard"
        )

    def start_worker(
        self, number: int, *, package: bool = True, nanny: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start a worker of one thread; ``package``: with pyqmigrate, ``nanny``: with a process that
        starts it again."""
        self.workers[number] = self._start(
            "dask_worker",
            f"worker{number}",
            self.address,
            "--nthreads=1",
            f"--name=w{number}",
            "--no-dashboard",
            "--memory-limit=0",
            f"--local-directory={self.where}",
            "--nanny" if nanny else "--no-nanny",
            *(["--preload", str(self._preload)] if package else []),
            package=package,
        )
        return self.workers[number]

    def wait_for_workers(self, count: int) -> None:
        """Wait until so many workers are connected."""
        from distributed import Client

        assert self.scheduler.poll() is None, self.printed()
        with Client(self.address, set_as_default=False, timeout=_STARTS_IN) as client:
            client.wait_for_workers(count, timeout=_STARTS_IN)

    def kill(self, number: int) -> None:
        """SIGKILL a worker."""
        self.workers[number].send_signal(signal.SIGKILL)
        self.workers[number].wait()

    def printed(self) -> str:
        """Return everything that the processes printed."""
        return "".join(path.read_text() for path in sorted(self.where.glob("*.log")))

    def stop(self) -> None:
        """End all processes."""
        processes = [*self.workers.values(), self.scheduler]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + 10
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(
        self, program: str, name: str, *arguments: str, package: bool = True
    ) -> subprocess.Popen[bytes]:
        # Without site's .pth files a package that is installed editable is missing.
        flags = [] if package else ["-S", "-P"]
        paths = [] if package else [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        code = _MAIN.format(paths=paths, program=program)
        with (self.where / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *flags, "-c", code, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.where,
                env=self._environment,
            )


@contextlib.contextmanager
def dask_cluster(
    *workers: int, nanny: bool = False, seconds: float = 0.0, failures: int = 3
) -> Iterator[Cluster]:
    """A scheduler, with a worker for each number; all are ended on exit. See :class:`Cluster`."""
    with tempfile.TemporaryDirectory() as where:
        cluster = Cluster(Path(where), seconds=seconds, failures=failures)
        try:
            for number in workers:
                cluster.start_worker(number, nanny=nanny)
            if workers:
                cluster.wait_for_workers(len(workers))
            yield cluster
        finally:
            cluster.stop()
