"""Ctrl-C ends every verb at once, whatever it is doing."""

from __future__ import annotations

import lzma
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyqmigrate.format.libvirt import ImageFormat
from tests.harness.command import COMMAND, make_snapshot, pages
from tests.harness.directories import directory_on_disk
from tests.harness.pipes import front
from tests.harness.stream_builders import EOF, RAM_EOS, end, footer, start, str8, words

SOON = 0.5  # seconds
NOISE = 2.5  # seconds more that a busy machine may take
MOMENTS = [0.1, 0.25, 0.45, 0.8, 1.3]  # seconds after the start: imports, opening, work
WAIT = 30  # seconds for a verb that has to have begun
FAR = 1 << 40  # bytes of a memory that is nearly all of a hole
LENGTH = 64 << 20  # bytes of the block of a long stream
ENDED = {130, -signal.SIGINT}  # the second, or Python's own words, before our program begins


def long_stream() -> bytes:
    """An image of libvirt's, compressed: some hundred KiB out of which come 100 GiB of records."""
    record = words(0x28 | 4096) + bytes(4096)
    piece = lzma.compress(record * 4096)  # 16 MiB
    head = (
        b"QEVM"
        + struct.pack(">IBI", 3, 7, 2)
        + b"pc"
        + start(1, "ram", 4, words(LENGTH | 4) + str8("ram") + words(LENGTH) + RAM_EOS)
        + struct.pack(">BI", 2, 1)
        + words(0x08)
        + str8("ram")
        + bytes(4096)
    )
    tail = RAM_EOS + footer(1) + end(1, RAM_EOS) + EOF
    return front(ImageFormat.XZ) + lzma.compress(head) + piece * 6400 + lzma.compress(tail)


@pytest.fixture(scope="module")
def inputs() -> Iterator[Path]:
    """``long``: that stream; ``sparse``: a snapshot of a huge memory; ``zeros``: raw memory."""
    with directory_on_disk() as directory:
        (directory / "long").write_bytes(long_stream())
        for name, size in (("zeros", 4 << 30), ("hole", FAR)):
            with (directory / name).open("wb") as file:
                file.write(pages(3))
                file.truncate(size)
        subprocess.run(
            [*COMMAND, "pack", directory / "sparse", f"ram={directory}/hole"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        make_snapshot(directory / "small", {"ram": pages(9)})
        yield directory


Arguments = Callable[[Path, Path], list[str]]

VERBS: dict[str, Arguments] = {
    "info": lambda i, o: ["info", f"{i}/long"],
    "verify": lambda i, o: ["verify", f"{i}/long"],
    "devices": lambda i, o: ["devices", f"{i}/long"],
    "unpack": lambda i, o: ["unpack", f"{i}/long", f"{o}/raw"],
    "to mapped-ram": lambda i, o: ["convert", f"{i}/long", f"{o}/to", "--to", "mapped-ram"],
    "to stream": lambda i, o: ["convert", f"{i}/sparse", f"{o}/to", "--to", "stream"],
    "seal": lambda i, o: ["seal", f"{o}/big", "--algorithm", "sha256", "--channels", "1"],
    "pack": lambda i, o: ["pack", f"{o}/to", f"ram={i}/zeros", "--sparse", "dense"],
    "pack with a seal": lambda i, o: [
        "pack",
        f"{o}/to",
        f"ram={i}/zeros",
        "--sparse",
        "dense",
        "--seal=sha256",
    ],
    "demo": lambda i, o: ["demo", "--dir", f"{o}", "--size", "64MiB"],
    "bench": lambda i, o: ["bench", "--dir", f"{o}", "--size", "64MiB"],
}
SHORT = {"seal", "demo", "bench"}  # verbs that may have ended before they could be interrupted


@pytest.mark.parametrize("moments", [[0.5], pytest.param(MOMENTS, marks=pytest.mark.long)])
@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_ends_a_verb_at_once(
    verb: str, moments: list[float], inputs: Path, disk: Path, child_environment: dict[str, str]
) -> None:
    if verb == "seal":
        make_snapshot(disk / "big", {"ram": pages(300) * 160}, sparse="dense")
    before = sorted(path.name for path in disk.iterdir())
    late = 0
    for moment in moments:
        process = subprocess.Popen(
            [*COMMAND, *VERBS[verb](inputs, disk)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=child_environment,
        )
        try:
            time.sleep(moment)
            if process.poll() is not None:
                assert process.returncode in (0, 3), process.communicate()[1]
                late += 1
                for path in disk.iterdir():
                    if path.name not in before:
                        path.unlink()
                continue
            process.send_signal(signal.SIGINT)
            sent = time.monotonic()
            _, err = process.communicate(timeout=WAIT)
            took = time.monotonic() - sent
        finally:
            process.kill()
            process.wait()
        ended = process.returncode in ENDED or b"Fatal Python error: init" in err
        assert ended or (verb in SHORT and process.returncode in (0, 3)), err
        assert took < SOON + NOISE, f"{took:.1f} s after {moment} s"
        if ended:
            assert sorted(path.name for path in disk.iterdir()) == before
    assert verb in SHORT or not late


def test_ctrl_c_ends_a_server(tmp_path: Path, child_environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [*COMMAND, "serve", "--qmp", f"unix:{tmp_path}/qmp", "--ram", f"a={tmp_path}/r,size=64M"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=child_environment,
    )
    deadline = time.monotonic() + WAIT
    while not (tmp_path / "qmp").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    sent = time.monotonic()
    assert process.wait(WAIT) == 0, process.communicate()[1]
    assert time.monotonic() - sent < SOON + NOISE
    assert process.stderr is not None
    process.stderr.close()
