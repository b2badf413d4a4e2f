"""Machines that are no PC, under TCG, stopped before their first instruction.

Their QEMUs are unpacked, not installed; see ``unpacked``.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pyqmigrate.qmp.client import QmpClient
from pyqmigrate.vm.guest.ramblock import parse_ramblock
from tests.harness.machine import GuestRam
from tests.harness.unpacked import emulator

__all__ = ["TARGETS", "OtherQemu", "OtherTarget", "memory_of"]

_PATIENCE = 30.0  # seconds


@dataclass(frozen=True)
class OtherTarget:
    """A machine of another target. ``length`` of its RAM in bytes, ``block`` the RAM's name."""

    program: str
    machine: str
    block: str
    arguments: tuple[str, ...] = ()
    length: int = 64 << 20

    def command(self, backend: str) -> list[str]:
        """The command line, without a monitor; ``backend`` ends the RAM's ``-object``."""
        kind, _, options = backend.partition(",")
        memory = f"memory-backend-{kind},id={self.block},size={self.length},{options}"
        return [
            emulator(self.program),
            "-accel",
            "tcg",
            "-nodefaults",
            "-display",
            "none",
            "-machine",
            f"{self.machine},memory-backend={self.block}",
            "-m",
            f"{self.length >> 20}M",
            "-object",
            memory.removesuffix(","),
            *self.arguments,
        ]


TARGETS = {
    "aarch64": OtherTarget("aarch64", "virt", "mach-virt.ram", ("-cpu", "cortex-a57")),
    "riscv64": OtherTarget("riscv64", "virt", "riscv_virt_board.ram", ("-bios", "none")),
    "ppc64": OtherTarget("ppc64", "pseries", "ppc_spapr.ram", length=256 << 20),
    "s390x": OtherTarget("s390x", "s390-ccw-virtio", "s390.ram"),
}


class OtherQemu:
    """A QEMU of another target with its RAM in ``ram``; killed on exit.

    Inside the ``with`` it has put its firmware where that belongs, and writes no more.
    """

    def __init__(self, target: OtherTarget, ram: GuestRam, extra: Sequence[str] = ()) -> None:
        assert ram.length == target.length
        self._directory = tempfile.TemporaryDirectory(prefix="qemu-")
        self.socket = Path(self._directory.name) / "qmp"
        self._stderr = Path(self._directory.name) / "stderr"
        backend = f"file,share=on,mem-path=/proc/self/fd/{ram.fd}"
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [
                    *target.command(backend),
                    "-S",
                    *extra,
                    "-qmp",
                    f"unix:{self.socket},server=on,wait=off",
                ],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=[ram.fd],
            )

    def __enter__(self) -> Self:
        try:
            self.connect().close()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._directory.cleanup()

    def connect(self) -> QmpClient:
        """A session; only one at a time gets a greeting."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return QmpClient.connect(self.socket)
            except (FileNotFoundError, ConnectionError):
                said = self._stderr.read_text(errors="replace")
                assert self.process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.01)

    def save(self, path: Path, **parameters: Any) -> None:
        """QEMU saves as a mapped-ram file; with multifd when parameters are given."""
        wanted = {"mapped-ram": True, "multifd": bool(parameters)}
        states = [{"capability": name, "state": on} for name, on in wanted.items()]
        with self.connect() as qmp:
            qmp.execute("migrate-set-capabilities", {"capabilities": states})
            qmp.execute("migrate-set-parameters", {"max-bandwidth": 0, **parameters})
            qmp.execute("migrate", {"uri": f"file:{path}"})
            deadline = time.monotonic() + _PATIENCE
            while (state := qmp.execute("query-migrate"))["status"] != "completed":
                assert state["status"] not in ("failed", "cancelled"), state
                assert time.monotonic() < deadline, state
                time.sleep(0.01)


def memory_of(qmp: QmpClient, pid: int, block: str) -> bytes:
    """The bytes of one RAM block of a QEMU whose guest stands still."""
    table = qmp.execute("human-monitor-command", {"command-line": "info ramblock"})
    [line] = [line for line in parse_ramblock(table) if line.name == block]
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        return os.pread(memory.fileno(), line.length, line.host_address)
