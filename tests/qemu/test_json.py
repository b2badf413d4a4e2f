"""The JSON of the verbs that work with a QEMU is what docs/json.md says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import verbs
from tests.harness.bare import BareQemu
from tests.harness.json_page import assert_as_documented

pytestmark = pytest.mark.qemu

COMMAND = [sys.executable, "-m", "pyqmigrate"]
MACHINE = ("-M", "q35", "-m", "32M")


def test_vm_verbs_have_the_documented_keys(disk: Path) -> None:
    image = disk / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    drive = ("-drive", f"file={image},format=raw,if=virtio,file.locking=off")
    snapshot = disk / "guest.mapped"

    async def connected(monitor: object) -> None:
        """It listens."""

    with BareQemu(*MACHINE, *drive) as qemu:
        qemu.run(connected)
        for words in ((), ("--dir", str(disk))):
            ran = subprocess.run(
                [*COMMAND, "vm", "check", "--json", "--qmp", str(qemu.socket), *words],
                capture_output=True,
                text=True,
                check=True,
            )
            assert_as_documented("vm check", json.loads(ran.stdout))
        saved = verbs.save(qemu.socket, snapshot, "--seal")
        assert_as_documented("vm save", saved)
        assert saved["seal"] == {"path": f"{snapshot}.seal", "algorithm": "xxh3-128"}
        engine = verbs.save(qemu.socket, disk / "other", "--engine", "qemu")
        assert engine["settings"]
        assert_as_documented("vm save", engine)
    command = [
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-nodefaults",
        "-display",
        "none",
        *MACHINE,
        *drive,
    ]
    for mode in ("instant", "load", "lazy"):
        with verbs.restored(snapshot, command, "--mode", mode) as report:
            assert_as_documented("vm restore", report)
            if mode == "lazy":
                ran = subprocess.run(
                    [*COMMAND, "vm", "wait", "--json", str(report["pid"])],
                    capture_output=True,
                    check=True,
                )
                assert_as_documented("vm wait", json.loads(ran.stdout))


def test_vm_clone_has_the_documented_keys(disk: Path) -> None:
    snapshot = disk / "guest.mapped"

    async def connected(monitor: object) -> None:
        """It listens."""

    with BareQemu(*MACHINE) as qemu:
        qemu.run(connected)
        verbs.save(qemu.socket, snapshot)
    command = ["qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none", *MACHINE]
    process = subprocess.Popen(
        [
            *COMMAND,
            "vm",
            "clone",
            "--json",
            str(snapshot),
            "--count",
            "2",
            "--dir",
            str(disk),
            "--",
            *command,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        text = ""
        while not text.endswith("\n}\n"):
            text += process.stdout.readline()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    data = json.loads(text)
    assert_as_documented("vm clone", data | {"guests": []})
    for number, guest in enumerate(data["guests"], 1):
        assert guest.pop("number") == number
        assert guest.pop("qmp") == str(disk / f"{number}.qmp")
        assert_as_documented("vm restore", {"schema": 1, **guest})
