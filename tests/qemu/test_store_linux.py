"""One booted Linux at four moments and a second boot, in a store: sizes, bytes, restores and clones."""

from __future__ import annotations

import contextlib
import filecmp
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pyqmigrate import Snapshot, convert, open_snapshot
from pyqmigrate.format.store.zstd import compress
from pyqmigrate.integrity.verify import verify_seal
from pyqmigrate.snapshot.increment import IncrementSnapshot
from pyqmigrate.store import AddReport, Store, add, get, verify
from tests.harness.linux_guest import Console, LinuxGuest
from tests.harness.verbs import restored, save

pytestmark = [pytest.mark.qemu, pytest.mark.long, pytest.mark.timeout(600)]

PAGE = 4096
MIB = 1 << 20
MOMENTS = ("first", "soon", "later", "increment")
ALL = (*MOMENTS, "other boot")
CLONES = 10
WORK = """
seq 200000 | md5sum > /dev/null
dd if=/dev/urandom of=random bs=64k count=128 2>/dev/null
seq 400000 > numbers; gzip -1 < numbers > packed
echo 0 > count
variable=kept
while sleep 0.05; do i=$((i + 1)); echo $i > new; mv new count; done &
"""


@dataclass(frozen=True)
class Series:
    """A store with the snapshots, whose files are in ``directory``; ``checksum`` is that of a file of
    the guest."""

    guest: LinuxGuest
    directory: Path
    store: Path
    reports: dict[str, AddReport]
    checksum: str

    def file(self, name: str) -> Path:
        return self.directory / name.replace(" ", "-")

    def stored(self, name: str) -> str:
        return f"{self.store}#{self.file(name).name}"


@pytest.fixture(scope="module")
def series(module_disk: Path) -> Iterator[Series]:
    guest = LinuxGuest(module_disk)
    options = ("--seal", "--then", "resume")
    with guest.boot() as console:
        console.run(WORK, timeout=120)
        checksum = console.run("md5sum < random")
        for name in MOMENTS:
            if name == "soon":
                console.run("sleep 1")
            elif name != "first":
                console.run(f"seq 500000 | sort -r > {name}; md5sum < {name}", timeout=120)
            if name == "increment":
                save(guest.qmp, module_disk / name, "--base", str(module_disk / "first"))
            else:
                digests = ["--keep-digests"] if name == "first" else []
                save(guest.qmp, module_disk / name, *options, *digests)
    with guest.boot() as console:
        console.run(WORK, timeout=120)
        save(guest.qmp, module_disk / "other-boot", *options)
    reports = {}
    with Store.create(module_disk / "store") as store:
        for name in ALL:
            path = module_disk / name.replace(" ", "-")
            reports[name] = add(store, path)
        assert verify(store).intact
    yield Series(guest, module_disk, module_disk / "store", reports, checksum)


def prototype_sizes(paths: list[Path]) -> list[int]:
    """Bytes that a store of these files needs, each after those before it: pages that are not filled with
    one word, each once, 64 to a frame of zstd."""
    known: set[bytes] = set()
    sizes = []
    for path in paths:
        fresh = []
        with open_snapshot(path) as snapshot:
            for block in snapshot.blocks.values():
                memory = block.read(0, block.length)
                for offset in range(0, len(memory), PAGE):
                    page = memory[offset : offset + PAGE]
                    if page != page[:8] * (PAGE // 8) and page not in known:
                        known.add(page)
                        fresh.append(page)
        frames = [compress(b"".join(fresh[k : k + 64]), 1) for k in range(0, len(fresh), 64)]
        sizes.append(sum(map(len, frames)))
    return sizes


def test_stored_sizes_are_those_of_the_prototype_or_less(series: Series) -> None:
    sizes = prototype_sizes([series.file(name) for name in ALL])
    for name, expected in zip(ALL, sizes, strict=True):
        report = series.reports[name]
        stored = report.new_bytes + report.snapshot_bytes
        assert stored <= 1.05 * expected + 64 * 1024, (name, stored, expected)
    first = series.reports["first"].new_bytes
    assert series.reports["soon"].new_bytes < first / 10
    assert series.reports["other boot"].new_bytes < first


def test_each_is_compared_with_the_one_before(series: Series) -> None:
    parents = {name: report.parent for name, report in series.reports.items()}
    assert parents["soon"] == parents["increment"] == "first"
    assert parents["later"] in ("first", "soon")
    # Of a sealed pair, and of an increment, the pieces that differ are read.
    for name in ("soon", "increment"):
        report = series.reports[name]
        assert report.bytes_read < report.size / 2, report


def memory_of(snapshot: Snapshot) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(block.read(0, block.length), np.uint8)
        for name, block in snapshot.blocks.items()
    }


@contextlib.contextmanager
def mounted(series: Series, directory: Path) -> Iterator[Path]:
    command = [sys.executable, "-m", "pyqmigrate"]
    directory.mkdir()
    subprocess.run([*command, "mount", series.store, directory], check=True, timeout=60)
    try:
        yield directory
    finally:
        subprocess.run([*command, "umount", directory], check=True, timeout=60)


@pytest.mark.parametrize("name", ALL)
def test_what_is_got_and_what_is_mounted_are_equal_byte_for_byte(
    series: Series, tmp_path: Path, name: str
) -> None:
    """Every page, every bitmap, device state and description: all bytes of the file."""
    original = series.file(name)
    if name == "increment":  # it is stored as the file that it makes together with its base
        with open_snapshot(original) as snapshot:
            assert isinstance(snapshot, IncrementSnapshot)
        original = tmp_path / "whole"
        convert(series.file(name), original, to="mapped-ram")
    stored = series.file(name).name
    with Store.open(series.store) as store:
        get(store, stored, tmp_path / "got")
    assert filecmp.cmp(tmp_path / "got", original, shallow=False)
    assert verify_seal(tmp_path / "got").intact
    with mounted(series, tmp_path / "mounted") as directory:
        assert filecmp.cmp(directory / stored, original, shallow=False)
        assert verify_seal(directory / stored).intact
        with (
            open_snapshot(directory / stored) as shown,
            open_snapshot(series.file(name)) as snapshot,
        ):
            assert os.stat(directory / stored).st_mtime_ns == os.stat(series.file(name)).st_mtime_ns
            ours, theirs = memory_of(shown), memory_of(snapshot)
            assert ours.keys() == theirs.keys()
            for block, pages in ours.items():
                assert np.array_equal(pages, theirs[block]), block


def goes_on(console: Console, checksum: str | None) -> None:
    """Check that the shell has its variable, its file is whole, its process counts, no page was lost."""
    assert console.run("echo $variable") == "kept"
    if checksum is not None:
        assert console.run("md5sum < random") == checksum
    count = int(console.run("cat count"))
    console.run(f"until [ $(cat count) -gt {count} ]; do sleep 0.02; done")
    log = console.run("dmesg | grep -cE 'BUG|Oops|corrupt|Call Trace' || true")
    assert log == "0"


@pytest.mark.parametrize("mode", ["instant", "load"])
@pytest.mark.parametrize("through", ["mount", "store"])
@pytest.mark.parametrize("name", ALL)
def test_linux_goes_on(series: Series, tmp_path: Path, name: str, through: str, mode: str) -> None:
    with contextlib.ExitStack() as stack:
        if through == "mount":
            directory = stack.enter_context(mounted(series, tmp_path / "mounted"))
            source = directory / series.file(name).name
        else:
            source = Path(series.stored(name))
        path = tmp_path / "console"
        report = stack.enter_context(restored(source, series.guest.command(path), "--mode", mode))
        assert report["mode"] == mode
        with Console(path, timeout=60) as console:
            goes_on(console, series.checksum if name in MOMENTS else None)


def test_ten_clones_go_on(series: Series, tmp_path: Path) -> None:
    command = series.guest.command(tmp_path / "console-{n}")
    clone = [sys.executable, "-m", "pyqmigrate", "vm", "clone", series.stored("later")]
    process = subprocess.Popen(
        [*clone, "--count", str(CLONES), "--dir", str(tmp_path), "--", *command],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        # They share a processor or two.
        for number in range(1, CLONES + 1):
            with Console(tmp_path / f"console-{number}", timeout=120) as console:
                goes_on(console, series.checksum if number in (1, CLONES) else None)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
