"""Build a guest program that boots by PVH: ``ring3.S`` and one C file.

A process compiles each program once.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["build_kernel"]

_SOURCES = Path(__file__).parent
_LOADED_AT = 2 << 20
_FREESTANDING = [
    "-O2",
    "-ffreestanding",
    "-fno-pic",
    "-fno-pie",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-mcmodel=small",
]


def build_kernel(
    directory: Path,
    source: str,
    constants: Mapping[str, str],
    sections: Mapping[str, int] | None = None,
) -> Path:
    """Compile ``source`` of this folder, linked at 2 MiB; return the kernel's path.

    ``constants`` are defined for the preprocessor; ``sections`` are placed at fixed addresses.
    """
    kernel = directory / Path(source).with_suffix(".elf")
    kernel.write_bytes(_built(source, (*constants.items(),), (*(sections or {}).items(),)))
    return kernel


@functools.cache
def _built(
    source: str, constants: tuple[tuple[str, str], ...], sections: tuple[tuple[str, int], ...]
) -> bytes:
    defined = [f"-D{name}={value}" for name, value in constants]
    places = [f"--section-start={name}={place:#x}" for name, place in sections]
    with tempfile.TemporaryDirectory(prefix="kernel-") as name:
        start, program, kernel = (Path(name) / file for file in ("ring3.o", "program.o", "kernel"))
        subprocess.run(["gcc", "-c", _SOURCES / "ring3.S", "-o", start], check=True)
        compile_: list[str | Path] = [
            "gcc",
            *_FREESTANDING,
            *defined,
            "-c",
            _SOURCES / source,
            "-o",
            program,
        ]
        subprocess.run(compile_, check=True)
        link = ["ld", "-n", "-static", "-z", "noexecstack", f"-Ttext={_LOADED_AT:#x}", *places]
        subprocess.run(
            [*link, "-e", "entry", "-o", kernel, start, program], check=True, capture_output=True
        )
        return kernel.read_bytes()
