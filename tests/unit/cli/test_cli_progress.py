"""What a terminal sees of long work, and what a pipe does not."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from pyqmigrate.cli import progress
from pyqmigrate.io.job import Progress
from tests.harness.command import COMMAND, child

SIZE = 64 << 20
NO_RICH = "import sys; sys.modules['rich'] = None; import pyqmigrate.cli as c; sys.exit(c.main())"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw"
    path.touch()
    os.truncate(path, SIZE)
    return path


def on_terminal(arguments: list[str | Path], environment: dict[str, str]) -> str:
    """What a child writes to a terminal on its standard error."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=theirs, env=environment
        )
    finally:
        os.close(theirs)
    seen = b""
    try:
        while data := os.read(ours, 65536):
            seen += data
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(60) == 0, seen
    return seen.decode()


def test_piped_work_shows_no_progress(
    tmp_path: Path, raw: Path, child_environment: dict[str, str]
) -> None:
    ran = child("pack", tmp_path / "s", f"a={raw}", environment=child_environment)
    assert ran.returncode == 0
    assert ran.stderr == ""


def test_terminal_shows_a_bar(tmp_path: Path, raw: Path, child_environment: dict[str, str]) -> None:
    pytest.importorskip("rich")
    environment = child_environment | {"TERM": "xterm", "COLUMNS": "80"}
    seen = on_terminal(
        [*COMMAND, "pack", tmp_path / "s", f"a={raw}", "--sparse", "dense"], environment
    )
    assert "pack" in seen
    assert "100%" in seen


def test_work_is_done_without_rich(
    tmp_path: Path, raw: Path, child_environment: dict[str, str]
) -> None:
    arguments = ["pack", tmp_path / "s", f"a={raw}", "--sparse", "dense"]
    seen = on_terminal([sys.executable, "-c", NO_RICH, *arguments], child_environment)
    assert "\x1b" not in seen
    assert child("verify", tmp_path / "s", environment=child_environment).returncode == 0


class Terminal:
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_lines_without_rich_come_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.shown("save") as show:
        assert show is not None
        for now in (0.5, 1.5, 1.9, 2.6):
            done = int(now) << 30
            show(Progress(done, 4 << 30, 0, 0, 0, now, 512 << 20))
    assert terminal.text == "save: 25% of 4.0 GiB, 512 MiB/s\nsave: 50% of 4.0 GiB, 512 MiB/s\n"


def test_no_terminal_means_no_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.shown("save") as show:
        assert show is None
