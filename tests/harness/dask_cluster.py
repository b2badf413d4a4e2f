"""A Dask scheduler and its workers on the loopback interface, each a process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Cluster", "dask_cluster"]

_STARTS_IN = 60.0  # seconds
# Without site's .pth files a package that is installed editable is missing.
_WITHOUT_PACKAGE = ["-S", "-P", "-c"]
_MAIN = "import sys; sys.path[:0] = {paths!r}; from distributed.cli.{program} import main; main()"
_SETTINGS = {
    "DASK_DISTRIBUTED__WORKER__DAEMON": "False",
    "DASK_DISTRIBUTED__DASHBOARD__LINK": "",
    "DASK_DISTRIBUTED__ADMIN__LOG_LENGTH": "10",
}


class Cluster:
    """A scheduler at ``address``; its workers by number. What all print is in files of ``where``."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        found = where / "scheduler.json"
        self._scheduler = self._start(
            "dask_scheduler",
            "scheduler",
            "--host=127.0.0.1",
            "--port=0",
            "--no-dashboard",
            f"--scheduler-file={found}",
        )
        self._wait_for(lambda: found.exists() and '"address"' in found.read_text(), "scheduler")
        import json

        self.address = str(json.loads(found.read_text())["address"])

    def start_worker(
        self, number: int, *, threads: int = 1, package: bool = True, nanny: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start a worker; ``package``: with pyqmigrate, ``nanny``: one that is started again."""
        self.workers[number] = self._start(
            "dask_worker",
            f"worker{number}",
            self.address,
            f"--nthreads={threads}",
            f"--name=w{number}",
            "--no-dashboard",
            "--memory-limit=0",
            f"--local-directory={self.where}",
            "--nanny" if nanny else "--no-nanny",
            package=package,
        )
        return self.workers[number]

    def wait_for_workers(self, count: int) -> None:
        """Wait until so many workers are connected."""
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(count, timeout=_STARTS_IN)

    def kill(self, number: int) -> None:
        """SIGKILL a worker."""
        self.workers[number].send_signal(signal.SIGKILL)
        self.workers[number].wait()

    def printed(self) -> str:
        """Return everything that the processes printed."""
        return "".join(path.read_text() for path in sorted(self.where.glob("*.log")))

    def stop(self) -> None:
        for process in (*self.workers.values(), self._scheduler):
            process.terminate()
        for process in (*self.workers.values(), self._scheduler):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(
        self, program: str, name: str, *arguments: str, package: bool = True
    ) -> subprocess.Popen[bytes]:
        paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        flags = ["-c"] if package else _WITHOUT_PACKAGE
        code = _MAIN.format(paths=[] if package else paths, program=program)
        with (self.where / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *flags, code, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.where,
                env={**os.environ, **_SETTINGS},
            )

    def _wait_for(self, there: object, what: str) -> None:
        deadline = time.monotonic() + _STARTS_IN
        while not there():  # type: ignore[operator]
            assert self._scheduler.poll() is None, self.printed()
            assert time.monotonic() < deadline, f"no {what}: {self.printed()}"
            time.sleep(0.02)


@contextlib.contextmanager
def dask_cluster(*workers: int) -> Iterator[Cluster]:
    """A scheduler, with a worker of one thread for each number; all are ended on exit."""
    with tempfile.TemporaryDirectory() as where:
        cluster = Cluster(Path(where))
        try:
            for number in workers:
                cluster.start_worker(number)
            if workers:
                cluster.wait_for_workers(len(workers))
            yield cluster
        finally:
            cluster.stop()
