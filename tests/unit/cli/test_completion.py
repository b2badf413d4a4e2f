"""Completion of the command line: in a real bash, in a real zsh, and what it costs."""

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.cli import build_parser

BIN = Path(sys.executable).parent
WAIT = 20  # seconds for an answer of a shell on a busy machine
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], ""),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit; compinit -u -D\n"),
}


class Shell:
    """An interactive shell on a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            path = f"{BIN}:{os.environ['PATH']}"
            os.execvpe(command[0], command, {"PATH": path, "TERM": "dumb", "HOME": "/nonexistent"})

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def read_until(self, expected: str) -> str:
        """Return what the shell writes, up to ``expected``."""
        text, deadline = "", time.monotonic() + WAIT
        while expected not in text:
            ready, _, _ = select.select([self.fd], [], [], deadline - time.monotonic())
            assert ready, f"no {expected!r} in {text!r}"
            text += os.read(self.fd, 4096).decode("utf-8", "replace")
        return text


@contextlib.contextmanager
def running(name: str, *setup: str) -> Iterator[Shell]:
    command, start = SHELLS[name]
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    shell = Shell(command)
    try:
        shell.type(start)
        for line in setup:
            shell.type(f"{line}\n")
        shell.type("echo rea''dy\n")
        shell.read_until("ready")
        yield shell
    finally:
        os.kill(shell.pid, signal.SIGKILL)
        os.waitpid(shell.pid, 0)
        os.close(shell.fd)


@pytest.mark.parametrize("name", SHELLS)
@pytest.mark.parametrize(
    ("typed", "added"),
    [
        ("pyqmigrate ver", "ify"),
        ("pyqmigrate --json vm re", "store"),
        ("pyqmigrate vm save --eng", "ine"),
        ("pyqmigrate vm save --engine di", "rect"),
        ("pyqmigrate convert a b --to mapp", "ed-ram"),
    ],
)
def test_command_is_completed(name: str, typed: str, added: str) -> None:
    register = f'eval "$(register-python-argcomplete --shell {name} pyqmigrate)"'
    with running(name, register) as shell:
        shell.type(f"{typed}\t")
        shell.read_until(typed + added)


@pytest.mark.parametrize("name", SHELLS)
def test_module_is_completed(name: str) -> None:
    """``python -m pyqmigrate``, once completion is activated for Python's programs."""
    activate = 'eval "$(activate-global-python-argcomplete --dest=-)"'
    with running(name, activate) as shell:
        shell.type("python -m pyqmigrate ver\t")
        shell.read_until("python -m pyqmigrate verify")


def completions(line: str, *, python: str = "import pyqmigrate.cli as c; c.main()") -> set[str]:
    """What the command answers to a shell."""
    environment = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    environment |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n"}
    ran = subprocess.run(
        ["bash", "-c", '"$@" 8>&1 9>/dev/null', "-", sys.executable, "-c", python],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return {word.strip() for word in ran.stdout.splitlines()}


def test_every_verb_is_offered() -> None:
    parser = build_parser()
    parser.load_verbs([])
    [verbs] = [action for action in parser._actions if action.choices]
    assert completions("pyqmigrate ") == set(verbs.choices)


def test_words_behind_two_dashes_are_left_to_the_shell() -> None:
    assert completions("pyqmigrate vm restore guest.mapped -- ") == set()


def test_only_the_verb_on_the_line_is_imported(tmp_path: Path) -> None:
    listing = tmp_path / "modules"
    python = (
        "import atexit, os, sys, pyqmigrate.cli as c\n"
        f"os._exit = lambda code: (open({str(listing)!r}, 'w').write(' '.join(sys.modules)),"
        " sys.exit(code))\n"
        "c.main()"
    )
    assert "--no-progress" in completions("pyqmigrate info --", python=python)
    modules = set(listing.read_text().split())
    assert "pyqmigrate.cli.info" in modules
    assert not {"pyqmigrate.cli.pack", "pyqmigrate.cli.vm", "pyqmigrate.vm"} & modules


def test_a_command_that_runs_does_not_import_the_library() -> None:
    code = "import sys, pyqmigrate.cli as c; c.main(['info', '--help']); print(*sys.modules)"
    listed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "argcomplete" not in listed.splitlines()[-1].split()


def test_without_the_library_no_command_runs(tmp_path: Path) -> None:
    """What is on the line is being typed, and must not be carried out."""
    python = "import sys; sys.modules['argcomplete'] = None; import pyqmigrate.cli as c; c.main()"
    assert completions(f"pyqmigrate demo --dir {tmp_path} ", python=python) == set()
