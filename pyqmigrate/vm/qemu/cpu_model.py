"""Ask a QEMU executable which CPU features it can give to a guest, without a guest."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from typing import Any

from pyqmigrate.errors import QemuError, UsageError

__all__ = ["cpu_properties", "parse_model"]

_TIMEOUT = 20.0  # seconds: a QEMU without a machine answers in a tenth of one
_LONGEST_MESSAGE = 300  # characters


def parse_model(text: str) -> tuple[str, dict[str, bool | str]]:
    """Return the name and the properties of an argument of ``-cpu``: ``qemu64,+avx,pku=off``.

    Raises UsageError.
    """
    name, *words = text.split(",")
    if not name:
        raise UsageError(f"{text!r} is not a CPU model, as for QEMU's -cpu")
    properties: dict[str, bool | str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if word[:1] in ("+", "-") and len(word) > 1 and not equals:
            properties[word[1:]] = word[0] == "+"
        elif key:
            values: dict[str, bool | str] = {"": True, "on": True, "off": False}
            properties[key] = values.get(value, value)
    return name, properties


def cpu_properties(
    executable: str | os.PathLike[str], accelerator: str, model: str
) -> dict[str, Any]:
    """Return the properties of a CPU model as this QEMU would make it here, with this accelerator.

    ``model`` is as for ``-cpu``; ``max`` has all that is possible. QEMU is started without a machine and
    ended; that takes some 0.1 s. Raises QemuError if it cannot be started or does not answer (as it
    does if KVM is not available), UsageError for a model that it does not know.
    """
    name, properties = parse_model(model)
    described: dict[str, Any] = {"name": name}
    if properties:
        described["props"] = properties
    commands: list[dict[str, Any]] = [
        {"execute": "qmp_capabilities"},
        {
            "execute": "query-cpu-model-expansion",
            "id": "model",
            "arguments": {"type": "full", "model": described},
        },
        {"execute": "quit"},
    ]
    words = [os.fspath(executable), "-machine", "none", "-accel", accelerator]
    words += ["-nodefaults", "-display", "none", "-qmp", "stdio"]
    try:
        done = subprocess.run(
            words,
            input="".join(json.dumps(command) + "\n" for command in commands),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except OSError as error:
        raise QemuError(f"cannot start {os.fspath(executable)!r}: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise QemuError(f"{os.fspath(executable)!r} did not answer in {_TIMEOUT:.0f} s") from None
    answer = _answer(done.stdout)
    if answer is None:
        said = done.stderr.strip()[-_LONGEST_MESSAGE:] or f"exit code {done.returncode}"
        raise QemuError(f"QEMU with accelerator {accelerator} did not start: {said}")
    if "error" in answer:
        raise UsageError(f"QEMU refused the CPU model {model!r}: {answer['error'].get('desc')}")
    try:
        return dict(answer["return"]["model"]["props"])
    except (KeyError, TypeError, ValueError):
        raise QemuError("QEMU gave no properties of the CPU model") from None


def _answer(text: str) -> Mapping[str, Any] | None:
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and value.get("id") == "model":
            return value
    return None
