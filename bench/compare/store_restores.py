"""Restores of a Linux guest from a store, local and far away, to the first byte of its serial port.

The guest writes to its serial port ten times a second, and works in between. QEMU connects the port to a
socket of this process. The time starts with the command; all files are cold. A remote store is the same
directory behind a web server of its own process, which waits 20 ms before each answer.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.results import OURS, Sample
from pyqmigrate.format.store.keys import working_set_key
from pyqmigrate.mount.asking import connect
from pyqmigrate.store import Store
from tests.harness.range_server import ServerProcess, serving

__all__ = [
    "FIRST_BYTE_WORK",
    "FROM_PLAIN",
    "FROM_REMOTE",
    "FROM_REMOTE_SET",
    "FROM_STORE",
    "FROM_STORE_SET",
    "first_bytes",
]

FIRST_BYTE_WORK = "restore to the first serial byte, cold"
FROM_PLAIN, FROM_STORE, FROM_STORE_SET = "plain file", "store", "store, working set"
FROM_REMOTE, FROM_REMOTE_SET = "remote store", "remote store, working set"
_NAMES = (FROM_PLAIN, FROM_STORE, FROM_STORE_SET, FROM_REMOTE, FROM_REMOTE_SET)

_DELAY = 0.02  # seconds for each request
_RECORDED = 3.0  # seconds
_LIMIT = 60.0
_RESTORE = [sys.executable, "-m", "pyqmigrate", "vm", "restore", "--running"]


def first_bytes(
    path: Path,
    place: Path,
    command: Callable[[Path], Sequence[str]],
    repeat: int,
    make_cold: Callable[[], None],
    add: Callable[[str, str, str, Sample], None],
) -> None:
    """Measure ``repeat`` restores of each kind, which take turns.

    path: the plain file, whose name the snapshot in the store ``place`` has.
    command: the guest's command line, with the path of the socket of its serial port.
    """
    cache = place.with_name("cache")
    _restore(f"{place}#{path.name}", command, place.parent, "--record", str(_RECORDED))
    with Store.open(place) as store, serving(place, _DELAY) as server:
        recorded = store.working_set(path.name)
        assert recorded is not None, "no working set was recorded"
        for number in range(repeat):
            for name in random.Random(number).sample(_NAMES, len(_NAMES)):
                if name in (FROM_STORE_SET, FROM_REMOTE_SET):
                    store.write_working_set(path.name, recorded)
                else:
                    store.place.delete(working_set_key(path.name))
                shutil.rmtree(cache, ignore_errors=True)
                make_cold()
                sample = _measure(name, path, place, command, server, cache)
                add(FIRST_BYTE_WORK, OURS, name, sample)


def _measure(
    name: str,
    path: Path,
    place: Path,
    command: Callable[[Path], Sequence[str]],
    server: ServerProcess,
    cache: Path,
) -> Sample:
    if name == FROM_PLAIN:
        return _restore(str(path), command, place.parent)
    if name in (FROM_STORE, FROM_STORE_SET):
        return _restore(f"{place}#{path.name}", command, place.parent)
    target = f"{server.url}#{path.name}"
    return _restore(target, command, place.parent, "--cache", str(cache))


def _restore(
    target: str, command: Callable[[Path], Sequence[str]], directory: Path, *options: str
) -> Sample:
    """Restore, wait for the first byte, and end the guest; with a recording, after it."""
    serial = directory / "serial"
    serial.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(serial))
        listener.listen()
        listener.settimeout(_LIMIT)
        start = time.perf_counter()
        process = subprocess.Popen(
            [*_RESTORE, *options, target, "--", *command(serial)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with listener.accept()[0] as console:
                console.settimeout(_LIMIT)
                console.recv(1)
                seconds = time.perf_counter() - start
                facts = _requests(process.pid)
                if "--record" in options:
                    time.sleep(_RECORDED + 1)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_LIMIT)
    return Sample(seconds, facts=facts)


def _requests(pid: int) -> dict[str, Any]:
    """Return how many requests to a remote store there were until now, and how many on demand."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in children:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{child}/maps").read_text().splitlines():
                device = line.split()[3]
                major, minor = (int(part, 16) for part in device.split(":"))
                client = connect(os.makedev(major, minor), os.geteuid()) if minor else None
                if client is not None:
                    with contextlib.closing(client):
                        status = client.ask("status")
                    return {key: status[key] for key in ("fetched", "fetched_on_demand")}
    return {}
