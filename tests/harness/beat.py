"""The guest of ``beat.c``: how to build it, and a QEMU that runs it, with KVM where that works.

The guest checks its own memory; ``guest.py`` knows the pattern, so a test can check it as well.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
import time
from pathlib import Path

from tests.harness.freestanding import build_kernel
from tests.harness.machine import BINARY
from tests.harness.pattern_guest import (
    FIRST_PAGE,
    MUL_GENERATION,
    MUL_PAGE,
    MUL_WORD,
    PAGE,
    ZERO_EVERY,
)

__all__ = ["accelerator", "assert_beats_on", "build", "cpu_options"]

_WRONG = 0xFF
_FAULT = 0xFE
_PROBE_TIME = 15.0  # seconds


def build(directory: Path, ram_length: int) -> Path:
    """Compile the kernel for a guest of ``ram_length`` bytes; return its path."""
    constants = {
        "FIRST_PAGE": FIRST_PAGE,
        "END_PAGE": ram_length // PAGE,
        "ZERO_EVERY": ZERO_EVERY,
        "MUL_GENERATION": MUL_GENERATION,
        "MUL_PAGE": MUL_PAGE,
        "MUL_WORD": MUL_WORD,
    }
    defined = {name: f"{value:#x}u" for name, value in constants.items()}
    return build_kernel(directory, "beat.c", defined)


def cpu_options() -> list[str]:
    """The processor: all that the host has, without a register that some hosts do not let set."""
    return ["-cpu", "max,-arch-capabilities"]


@functools.cache
def accelerator() -> str:
    """``kvm`` where /dev/kvm opens and a guest of this kind shows that it runs; else ``tcg``."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return "tcg"
    with tempfile.TemporaryDirectory(prefix="kvm-probe-") as name:
        directory = Path(name)
        serial = directory / "serial"
        serial.touch()
        kernel = build(directory, 8 << 20)
        command = [
            BINARY,
            "-accel",
            "kvm",
            *cpu_options(),
            "-M",
            "microvm",
            "-m",
            "8",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-kernel",
            str(kernel),
            "-serial",
            f"file:{serial}",
        ]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            deadline = time.monotonic() + _PROBE_TIME
            while time.monotonic() < deadline and process.poll() is None:
                if (beats := serial.read_bytes()[:3]) == b"\1\2\3" or _FAULT in beats:
                    break
                time.sleep(0.01)
            process.kill()
        return "kvm" if serial.read_bytes()[:3] == b"\1\2\3" else "tcg"


def assert_beats_on(serial: Path, first: int, beats: int, seconds: float = 60) -> None:
    """Wait for so many generations; the one that the guest was in, ``first``, comes first, or the
    next, and the guest has found nothing wrong."""
    deadline = time.monotonic() + seconds
    while len(said := serial.read_bytes()) < beats and _FAULT not in said:
        assert time.monotonic() < deadline, f"the guest stands after {list(said)}"
        time.sleep(0.01)
    assert said[0] in (first & 0x7F, first + 1 & 0x7F), f"{said[0]} after generation {first}"
    assert _FAULT not in said, "the guest's processor reports a fault"
    assert _WRONG not in said, f"the guest finds pages that are wrong: {list(said)}"
    assert list(said) == [(said[0] + n) & 0x7F for n in range(len(said))]
