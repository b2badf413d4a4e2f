"""The command line, program and user of a QEMU process that gets a twin.

They are read while the process runs, and do not need it afterwards. The command line is untrusted,
since a process can change its own: only :mod:`pyqmigrate.vm.twin.command` uses it, which passes on
known options only, and the twin never has more rights than the process had.
"""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.process_command import read_command

__all__ = ["Original"]

_NAMESPACES = ("mnt", "user")
_PROBE_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Original:
    """A QEMU's command line, program and user. Close it.

    ``program`` is a descriptor of the executable, -1 if ``command`` names it. ``before`` are the
    words of a wrapper that runs a program with exactly the rights of the process.
    """

    command: CommandLine
    program: int
    before: tuple[str, ...]

    @classmethod
    def of_process(cls, pid: int | None) -> Original:
        """Inspect a process. Raises NotSupported if a twin of it cannot, or must not, run."""
        if pid is None:
            raise NotSupported("its process is unknown")
        process = Path(f"/proc/{pid}")
        try:
            before = _user_words(process)
            _check_place(process)
            shown = read_command(pid)
            command = CommandLine.parse(shown.words or ())
            program = os.open(process / "exe", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NotSupported(f"{process} cannot be read: {error.strerror}") from error
        except UsageError as error:
            raise NotSupported(f"its command line is invalid: {error}") from error
        try:
            _check_program(program)
        except BaseException:
            os.close(program)
            raise
        return cls(command._replace(directory=shown.directory), program, before)

    @classmethod
    def of_command(cls, command: CommandLine) -> Original:
        """Take a given or recorded command line, which runs with this process's rights."""
        return cls(command, -1, ())

    def words_before(self) -> tuple[str, ...]:
        """Return ``before``, with a wrapper for a private network namespace if possible."""
        unshare = ("unshare", "--map-root-user", "--net", "--")
        try:
            probe = subprocess.run(
                [*self.before, *unshare, "true"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_PROBE_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return self.before
        return self.before if probe.returncode else (*self.before, *unshare)

    def close(self) -> None:
        """Close ``program``. Call it once."""
        if self.program >= 0:
            os.close(self.program)


def _check_place(process: Path) -> None:
    """Refuse containers: outside of one, a program could reach more than inside."""
    for name in _NAMESPACES:
        there, here = (process / "ns" / name).readlink(), Path("/proc/self/ns", name).readlink()
        if there != here:
            raise NotSupported("it runs in a container (another mount or user namespace)")
    if not (process / "root").samefile("/"):
        raise NotSupported("it runs in another root directory (chroot)")


def _check_program(fd: int) -> None:
    """Refuse a program that another, unprivileged user may have replaced."""
    info = os.fstat(fd)
    if info.st_uid == os.geteuid() != 0:
        return
    if info.st_uid not in (0, os.geteuid()) or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotSupported(
            "its program belongs neither to root nor to this user, or others may write to it"
        )


def _user_words(process: Path) -> tuple[str, ...]:
    """Return a wrapper that runs a program as the process's user, without capabilities."""
    status = _status(process)
    user, group = _effective(status["Uid"]), _effective(status["Gid"])
    own = _status(Path("/proc/self"))
    if user == os.geteuid():
        if int(own["CapEff"], 16) & ~int(status["CapEff"], 16):
            raise NotSupported("it has fewer capabilities than this process")
        return ()
    if os.geteuid() != 0:
        raise NotSupported("it runs as another user")
    groups = ",".join(status["Groups"].split())
    return (
        "setpriv",
        f"--reuid={user}",
        f"--regid={group}",
        f"--groups={groups}" if groups else "--clear-groups",
        "--inh-caps=-all",
        "--",
    )


def _effective(numbers: str) -> int:
    return int(numbers.split()[1])


def _status(process: Path) -> dict[str, str]:
    lines = (process / "status").read_text(errors="replace").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
