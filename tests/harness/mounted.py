"""Mounts of files that are slow, damaged or replaced, served by a real keeper in a process of its own.

A directory holds plain files. A file ``NAME.gate`` in it makes all reads of NAME wait until it is gone;
``NAME.damaged`` makes them fail from the offset on that it contains.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from pyqmigrate.errors import TargetError
from pyqmigrate.io.plain_file import LocalPlainFile, PlainFile
from pyqmigrate.mount.asking import KeeperClient, listen
from pyqmigrate.mount.files import COMPANIONS, SingleFile
from pyqmigrate.mount.keeper import Keeper, KeeperSettings
from pyqmigrate.mount.mounting import find_mounts, mount, unmount
from pyqmigrate.mount.server import Owner

__all__ = ["DirectoryFiles", "Mounted", "await_that", "kill_workers", "need_fuse"]

_ROOT = Path(__file__).parents[2]
_CONTROLS = (".gate", ".damaged")
_POLL = 0.01


class GatedFile(LocalPlainFile):
    """A local file whose reads wait or fail on demand."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, COMPANIONS)
        self._gate = path.with_name(f"{path.name}.gate")
        self._damaged = path.with_name(f"{path.name}.damaged")

    def read(self, offset: int, length: int) -> bytes:
        while self._gate.exists():
            time.sleep(_POLL)
        with contextlib.suppress(FileNotFoundError):
            if offset + length > int(self._damaged.read_text()):
                raise TargetError(errno.EIO, "page 7 of pack 0123 is damaged", "store")
        return super().read(offset, length)


class DirectoryFiles:
    """The files of a directory, as they are at each moment."""

    readers = 1

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> Iterator[str]:
        for name in os.listdir(self._directory):
            if not name.endswith(_CONTROLS):
                yield name

    def identity(self, name: str) -> str | None:
        if name.endswith((*_CONTROLS, *COMPANIONS)):
            return None
        return SingleFile(str(self._directory / name)).identity(name)

    def open(self, name: str) -> PlainFile:
        return GatedFile(self._directory / name)

    def on_request(self, count: Callable[[bool], object]) -> None:
        """Do nothing: no place is remote."""

    def fetch_rest(self) -> None:
        """Do nothing: all is local."""


class Mounted:
    """A mount of the files of ``source`` on ``directory``. A context manager, which unmounts.

    With ``remember`` the keeper does what it does on kernels without FUSE_NOTIFY_RESEND.
    """

    def __init__(
        self, source: Path, directory: Path, *, remember: bool = False, record: bool = False
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.path = directory
        ours, theirs = socket.socketpair()
        order = {
            "source": str(source),
            "directory": str(directory),
            "remember": remember,
            "record": record,
            "control": theirs.fileno(),
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.harness.mounted", json.dumps(order)],
                pass_fds=(theirs.fileno(),),
                cwd=_ROOT,
            )
        self.client = KeeperClient(ours)
        try:
            self.client.wait(30)
        except BaseException:
            self.close()
            raise

    def status(self) -> dict[str, Any]:
        return self.client.ask("status")

    def worker(self) -> int:
        """The process that serves; waits while there is none."""
        while (pid := self.status()["worker"]) is None:
            time.sleep(_POLL)
        return int(pid)

    def close(self) -> None:
        """Unmount, even if it is in use, and end the keeper. Idempotent."""
        self.client.close()
        with contextlib.suppress(OSError):
            unmount(str(self.path), lazy=True)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kill_workers(
    mounted: Mounted, kills: int, reader: subprocess.Popen[bytes], seed: int = 1
) -> None:
    """SIGKILL the worker ``kills`` times at random moments, while ``reader`` runs."""
    rng = random.Random(seed)
    killed = mounted.status()["restarts"]
    for number in range(killed, killed + kills):
        time.sleep(rng.uniform(0.0, 0.06))
        if reader.poll() is not None:
            return
        os.kill(mounted.worker(), signal.SIGKILL)
        await_that(lambda number=number: mounted.status()["restarts"] > number)


def await_that(condition: Callable[[], bool], limit: float = 20.0) -> None:
    """Wait until a condition is true. AssertionError after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(_POLL)


def need_fuse(directory: Path) -> None:
    """Skip the test if this user cannot mount here; in CI that is a failure."""
    try:
        fd = mount(str(directory), "probe", allow_other=False)
    except (OSError, NotImplementedError) as error:
        reason = f"FUSE cannot be mounted here: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    unmount(str(directory), lazy=True)
    os.close(fd)


def _main() -> None:
    order = json.loads(sys.argv[1])
    directory = order["directory"]
    fd = mount(directory, order["source"], allow_other=False)
    device = find_mounts(directory)[-1].device
    owner = Owner(os.geteuid(), os.getegid(), readable_by_all=False)
    Keeper(
        fd,
        lambda: DirectoryFiles(Path(order["source"])),
        KeeperSettings(
            directory, order["source"], owner, remember=order["remember"], record=order["record"]
        ),
        control=socket.socket(fileno=order["control"]),
        listener=listen(device),
    ).run()


if __name__ == "__main__":
    _main()
