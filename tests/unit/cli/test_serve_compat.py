"""The version that ``serve --compat`` announces."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("option", "version"),
    [("--compat", [10, 0, 2]), ("--compat=10.0", [10, 0, 2]), ("--compat=11.1", [11, 1, 3])],
)
def test_a_server_announces_the_version_that_it_imitates(
    tmp_path: Path, option: str, version: list[int]
) -> None:
    path = tmp_path / "qmp"
    command = [
        sys.executable,
        "-m",
        "pyqmigrate",
        "serve",
        option,
        "--qmp",
        f"unix:{path}",
        "--ram",
        f"pc.ram={tmp_path}/ram,size=1M",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            told = greeting(path, server)["QMP"]["version"]["qemu"]
        finally:
            server.terminate()
    assert [told["major"], told["minor"], told["micro"]] == version


def greeting(path: Path, server: subprocess.Popen[bytes]) -> dict[str, dict[str, dict[str, dict]]]:
    deadline = time.monotonic() + 60
    while True:
        with socket.socket(socket.AF_UNIX) as client:
            if client.connect_ex(str(path)) == 0:
                return json.loads(client.makefile().readline())
        assert server.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_another_version_is_refused(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pyqmigrate",
        "serve",
        "--compat=9.2",
        "--qmp",
        "unix:x",
        "--ram",
        f"pc.ram={tmp_path}/ram,size=1M",
    ]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "'9.2' (choose from" in refused.stderr
    assert not (tmp_path / "ram").exists()
