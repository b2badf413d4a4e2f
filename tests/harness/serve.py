"""``pyqmigrate serve`` as a process, driven by the client library that managers use.

    with Driver() as driver, GuestRam(64 << 20) as ram, Serve(driver, ram) as server:
        server.execute("migrate", {"uri": f"file:{path}"})
        server.wait()

It has the methods of :class:`tests.harness.machine.Qemu` that a scenario needs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from pyqmigrate.errors import QemuRefused
from tests.harness.machine import GuestRam, MigrationFailed, Qemu
from tests.harness.qmp_server import RawClient
from tests.harness.version import qemu_version

__all__ = ["Driver", "Serve", "Witness", "failure", "imitated"]

ROOT = Path(__file__).resolve().parents[2]
STEPS = ROOT / "tests" / "harness" / "step_driver.py"
TERMINAL = ["completed", "failed", "cancelled"]


class Driver:
    """The client library in a program of its own; one serves any number of servers."""

    def __init__(self) -> None:
        self._names = itertools.count()
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            self.process = subprocess.Popen([sys.executable, "-P", str(STEPS)], stdin=there)
        self._steps = here
        here.settimeout(90)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.close()
        self.process.kill()
        self.process.wait()

    def connect(self, path: Path) -> str:
        """A new client of the server at ``path``; its name."""
        name = str(next(self._names))
        self.take({"connect": name, "socket": str(path)})
        return name

    def take(self, step: dict[str, Any], *fds: int) -> dict[str, Any]:
        socket.send_fds(self._steps, [json.dumps(step).encode()], fds)
        answer: dict[str, Any] = json.loads(self._steps.recv(1 << 20))
        if "broken" in answer:
            raise ConnectionError(answer["broken"])
        return answer


IMITATED = ((10, 0), (11, 1))


def imitated() -> tuple[int, int]:
    """The version that a compat server imitates: the newest that is not newer than the QEMU."""
    return max(version for version in IMITATED if version <= max(qemu_version(), IMITATED[0]))


def failure() -> list[str]:
    """The last statuses of a save that fails, in the imitated version."""
    return ["failing", "failed"] if imitated() >= (11, 1) else ["failed"]


class Serve:
    """One ``pyqmigrate serve`` in front of ``ram``, and a client connected to it.

    With ``compat`` it imitates the QEMU at hand.
    """

    def __init__(
        self,
        driver: Driver,
        ram: GuestRam,
        *,
        machine: str = "pc-i440fx-10.0",
        incoming: bool = False,
        compat: bool = False,
        block: str = "pc.ram",
        uuid: str = "",
    ) -> None:
        self._driver = driver
        self.machine = machine
        self.events: list[dict[str, Any]] = []
        self._directory = tempfile.TemporaryDirectory(prefix="serve-")
        self.socket = Path(self._directory.name) / "qmp.sock"
        self._stderr = Path(self._directory.name) / "stderr"
        self._clients: list[str] = []
        command = [
            sys.executable,
            "-m",
            "pyqmigrate",
            "serve",
            "--qmp",
            f"unix:{self.socket}",
            "--ram",
            f"{block}=/proc/self/fd/{ram.fd}",
            "--machine",
            machine,
            *(["--incoming", "defer"] if incoming else []),
            *([f"--compat={imitated()[0]}.{imitated()[1]}"] if compat else []),
            *(["--uuid", uuid] if uuid else []),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=[ram.fd],
                env=environment,
            )
        try:
            self._client = self._connect(time.monotonic() + 30)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            with contextlib.suppress(ConnectionError):
                self._driver.take({"close": client})
        self.process.kill()
        self.process.wait()
        self._directory.cleanup()

    def client(self) -> str:
        """One more client, for ``execute``."""
        self._clients.append(self._driver.connect(self.socket))
        return self._clients[-1]

    def disconnect(self) -> None:
        """Hang up and connect anew."""
        self._driver.take({"close": self._client})
        self._clients.remove(self._client)
        self._client = self.client()

    def raw(self) -> RawClient:
        """A client that says exactly what it is told."""
        return RawClient(self.socket)

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        fd: int | None = None,
        client: str | None = None,
        wait: list[str] | None = None,
    ) -> Any:
        step = {"client": client or self._client, "execute": command}
        if arguments is not None:
            step["arguments"] = arguments
        if wait is not None:
            step["wait"] = wait
        answer = self._driver.take(step, *([] if fd is None else [fd]))
        if client is None:
            self.events += answer["events"]
        if "error" in answer:
            raise QemuRefused(command, answer["error"]["desc"], answer["error"]["class"])
        return answer["return"]

    def set_capabilities(self, wanted: dict[str, bool]) -> None:
        states = [{"capability": name, "state": on} for name, on in wanted.items()]
        self.execute("migrate-set-capabilities", {"capabilities": states})

    def wait(self, limit: float = 60) -> dict[str, Any]:
        """Waits for the end of a migration, whichever it is; returns ``query-migrate``."""
        deadline = time.monotonic() + limit
        while True:
            result: dict[str, Any] = self.execute("query-migrate")
            if result.get("status") in TERMINAL:
                return result
            if time.monotonic() > deadline:
                raise MigrationFailed(result, self.stderr())
            time.sleep(0.005)

    def descriptors(self) -> int:
        """How many descriptors the server has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def end(self, number: signal.Signals, limit: float = 20) -> int:
        """Sends a signal and waits for the end; the exit status as Popen has it."""
        self.process.send_signal(number)
        return self.process.wait(limit)

    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    def _connect(self, deadline: float) -> str:
        while True:
            if self.socket.exists():
                with contextlib.suppress(ConnectionError):
                    return self.client()
            assert self.process.poll() is None, self.stderr()
            assert time.monotonic() < deadline, self.stderr()
            time.sleep(0.02)


class Witness:
    """Drives an end, and keeps every answer in a form that is the same for equal ends.

    Left out, because they are nobody's promise: the numbers of descriptors, the values of
    statistics (their names and types stay), how many passes there were, and the reason of a failed
    load. What is known to differ between the QEMU at hand and the version that a compat server
    imitates, and no more, is made equal.
    """

    def __init__(self, end: Qemu | Serve) -> None:
        self.end = end
        self.account: list[tuple[str, Any]] = []
        self._heard = len(self._events())

    def ask(
        self, command: str, arguments: dict[str, Any] | None = None, *, fd: int | None = None
    ) -> dict[str, Any]:
        """One command; its reply is noted, also one that is an error."""
        answer = self.hear(command, arguments, fd=fd)
        request = f"{command} {json.dumps(arguments)}"
        if isinstance(self.end, Qemu):
            _as_imitated(answer)
        result = answer.get("return")
        if isinstance(result, dict) and "error-desc" in result:
            said = result["error-desc"]
            result["error-desc"] = re.sub(r"(load of migration failed: [^:]+): .*", r"\1", said)
        self.account.append((request, _comparable(answer, numbers=command != "query-migrate")))
        return answer

    def hear(
        self, command: str, arguments: dict[str, Any] | None = None, *, fd: int | None = None
    ) -> dict[str, Any]:
        """As ``ask``, but nothing is noted."""
        try:
            return {"return": self.end.execute(command, arguments, fd=fd)}
        except QemuRefused as refused:
            return {"error": {"class": refused.error_class, "desc": refused.desc}}

    def rest(self) -> None:
        """Ends what an earlier test may have left under way; nothing of it is noted."""
        self.end.execute("migrate_cancel")
        while self.end.execute("query-migrate").get("status", "none") not in ["none", *TERMINAL]:
            time.sleep(0.005)
        while self.end.execute("query-status")["status"] == "finish-migrate":
            time.sleep(0.005)
        self.end.execute("cont")
        for fdset in self.end.execute("query-fdsets"):
            self.end.execute("remove-fd", {"fdset-id": fdset["fdset-id"]})
        self._heard = len(self._events())

    def state(self) -> None:
        """Notes what a manager can see of migration, guest and descriptors."""
        for command in ("query-migrate", "query-status", "query-fdsets"):
            self.ask(command)

    def settle(self, limit: float = 30) -> None:
        """Waits until a migration has ended and the guest is what it is to be afterwards."""
        deadline = time.monotonic() + limit
        while (
            self.end.execute("query-migrate").get("status") not in TERMINAL
            or self.end.execute("query-status")["status"] == "finish-migrate"
        ):
            assert time.monotonic() < deadline, self.end.execute("query-migrate")
            time.sleep(0.005)
        # QEMU lets go of its copies of removed descriptors a moment after it has failed.
        soon = time.monotonic() + 1
        while time.monotonic() < soon and not all(
            fdset["fds"] for fdset in self.end.execute("query-fdsets")
        ):
            time.sleep(0.005)

    def events(self) -> list[str]:
        """Notes the statuses since the last time, and STOP and RESUME among them.

        QEMU may tell of one failure twice (the thread and a channel both do): once is noted.
        """
        status = self.end.execute("query-migrate").get("status")
        deadline = time.monotonic() + 5  # a status is seen a moment before its event is sent
        while status in TERMINAL and status != self._last_status():
            assert time.monotonic() < deadline, f"no event for {status}"
            self.end.execute("query-status")  # what happened before it has been heard after it
        new = self._events()[self._heard :]
        self._heard += len(new)
        words = [e.get("data", {}).get("status", e["event"]) for e in new]
        words = [word for word in words if word not in {"MIGRATION_PASS", *_not_compared()}]
        once = [w for n, w in enumerate(words) if n == 0 or w != words[n - 1]]
        self.account.append(("events", once))
        return once

    def _last_status(self) -> str | None:
        told = [e["data"]["status"] for e in self._events() if e["event"] == "MIGRATION"]
        return told[-1] if told else None

    def _events(self) -> list[dict[str, Any]]:
        return self.end.qmp.events if isinstance(self.end, Qemu) else self.end.events


def _not_compared() -> list[str]:
    """Statuses between others that only one has, the QEMU at hand or the imitated version."""
    version = qemu_version()
    between = (11, 0) <= version < (11, 1)
    return ["device"] * (version < (10, 0)) + ["failing"] * between


def _as_imitated(answer: dict[str, Any]) -> None:
    """Makes of a reply of 10.2 or 11.0 what 10.0 says."""
    version, result = qemu_version(), answer.get("return")
    if not IMITATED[0] < version < IMITATED[1]:
        return
    if isinstance(result, dict):
        result.pop("cpr-exec-command", None)
    if "error" in answer:
        words = re.match("Option ([a-z-]+)( expects .*)", answer["error"]["desc"])
        if words:
            name = words[1].replace("-", "_")
            answer["error"]["desc"] = f"Parameter '{name}'{words[2]}"


def _comparable(value: Any, *, numbers: bool = True) -> Any:
    if isinstance(value, dict):
        found = {key: _comparable(inner, numbers=numbers) for key, inner in value.items()}
        if "fd" in found:
            found["fd"] = type(value["fd"])
        if "mbps" in found:  # a double without a fraction is written without a point
            found["mbps"] = float
        return found
    if isinstance(value, list):
        return [_comparable(inner, numbers=numbers) for inner in value]
    if isinstance(value, str):
        return re.sub(r"\bfd=\d+", "fd=N", value)
    return value if numbers or isinstance(value, bool) else type(value)
