"""Running the command: in this process for its results, as a child for all else."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import RamBlock, save
from pyqmigrate.cli import main

PAGE = 4096
COMMAND = [sys.executable, "-m", "pyqmigrate"]


@dataclass(frozen=True)
class Ran:
    """What a run of the command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as the one JSON object that it must be."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


@dataclass(frozen=True)
class Command:
    """Calls main() and captures what it prints."""

    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str | Path) -> Ran:
        self.capture.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *self.capture.readouterr())


def child(
    *arguments: str | Path, environment: dict[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=120,
    )


def pages(count: int, seed: int = 0) -> bytes:
    """Whole pages of noise, every third of them zero."""
    noise = random.Random(seed)
    return b"".join(bytes(PAGE) if n % 3 == 2 else noise.randbytes(PAGE) for n in range(count))


def make_snapshot(target: str | Path, blocks: dict[str, bytes], **options: Any) -> None:
    """Write a snapshot with these blocks."""
    save(target, [RamBlock(name, memory) for name, memory in blocks.items()], **options)
