"""The process of a QEMU, as far as another one has to know it to be its twin.

It is read while the process lives; what is held afterwards does not need it any more. Nothing here
is believed because the process says it: a process can change its command line, so that is only ever
given to :mod:`pyqmigrate.vm.twin.command`, which passes what it knows, and it never runs with more
rights than the process had.
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

    ``program`` is a descriptor of the file that the process executes, -1 where ``command`` names
    it. ``before`` are the words that run a program with the rights of the process and no others.
    """

    command: CommandLine
    program: int
    before: tuple[str, ...]

    @classmethod
    def of_process(cls, pid: int | None) -> Original:
        """Look at a process. Raises NotSupported where a twin of it cannot, or must not, run."""
        if pid is None:
            raise NotSupported("its process is not known")
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
            raise NotSupported(f"its command line is not understood: {error}") from error
        try:
            _check_program(program)
        except BaseException:
            os.close(program)
            raise
        return cls(command._replace(directory=shown.directory), program, before)

    @classmethod
    def of_command(cls, command: CommandLine) -> Original:
        """What a person gives, or recorded: it runs with this process's own rights."""
        return cls(command, -1, ())

    def words_before(self) -> tuple[str, ...]:
        """``before``, and what gives the program a network of its own where that is possible."""
        alone = ("unshare", "--map-root-user", "--net", "--")
        try:
            probe = subprocess.run(
                [*self.before, *alone, "true"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_PROBE_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return self.before
        return self.before if probe.returncode else (*self.before, *alone)

    def close(self) -> None:
        """Close ``program``. Once only."""
        if self.program >= 0:
            os.close(self.program)


def _check_place(process: Path) -> None:
    """Outside of its container a program could reach what it cannot reach in there."""
    for name in _NAMESPACES:
        there, here = (process / "ns" / name).readlink(), Path("/proc/self/ns", name).readlink()
        if there != here:
            raise NotSupported("it runs in a container (another mount or user namespace)")
    if not (process / "root").samefile("/"):
        raise NotSupported("it runs in another root directory (chroot)")


def _check_program(fd: int) -> None:
    """A process that is confined may not run what others put in the place of its program."""
    info = os.fstat(fd)
    if info.st_uid == os.geteuid() != 0:
        return
    if info.st_uid not in (0, os.geteuid()) or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotSupported(
            "its program belongs to another user than root and this one, or others may write it"
        )


def _user_words(process: Path) -> tuple[str, ...]:
    """The words that make a program the process's user, without capabilities."""
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
