"""A mount as programs see it: bytes, holes, times, names, errors and waits."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.harness.mounted import Mounted, await_that, kill_workers

MIB = 1 << 20
PAGE = 4096
READER = (
    "import os, sys\n"
    "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
    "print(len(os.pread(fd, 4096, int(sys.argv[2]))), flush=True)\n"
)


def content(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@contextlib.contextmanager
def reading(path: Path, offset: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A process that reads a page."""
    process = subprocess.Popen(
        [sys.executable, "-c", READER, str(path), str(offset)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def mounted(request: pytest.FixtureRequest, source: Path, mount_point: Path) -> Iterator[Mounted]:
    with Mounted(source, mount_point, remember=getattr(request, "param", False)) as mounted:
        yield mounted


# Tests in which it matters who reads the requests: the worker, or the keeper on old kernels.
both_ways = pytest.mark.parametrize(
    "mounted", [False, True], ids=["resend", "remember"], indirect=True
)
# The same, where those above cover the way of old kernels for `make test`.
mostly_one_way = pytest.mark.parametrize(
    "mounted",
    [False, pytest.param(True, marks=pytest.mark.long)],
    ids=["resend", "remember"],
    indirect=True,
)


@both_ways
def test_every_byte_is_that_of_the_file(mounted: Mounted, source: Path) -> None:
    (source / "guest").write_bytes(content(3 * MIB + 1234))
    assert (mounted.path / "guest").read_bytes() == content(3 * MIB + 1234)
    with (mounted.path / "guest").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
        assert mapping[MIB + 5 : MIB + 9000] == content(3 * MIB + 1234)[MIB + 5 : MIB + 9000]
        mapping.close()


def test_size_and_time_of_change_are_those_of_the_file(mounted: Mounted, source: Path) -> None:
    (source / "guest").write_bytes(content(12345))
    os.utime(source / "guest", ns=(1, 1_600_000_000_123_456_789))
    shown = (mounted.path / "guest").stat()
    assert (shown.st_size, shown.st_mtime_ns) == (12345, 1_600_000_000_123_456_789)


def test_holes_are_holes(mounted: Mounted, source: Path) -> None:
    with (source / "guest").open("wb") as file:
        file.truncate(8 * MIB)
        os.pwrite(file.fileno(), content(MIB), 2 * MIB)
    with (mounted.path / "guest").open("rb") as file:
        fd = file.fileno()
        assert os.lseek(fd, 0, os.SEEK_DATA) == 2 * MIB
        assert os.lseek(fd, 2 * MIB, os.SEEK_HOLE) == 3 * MIB
        with pytest.raises(OSError) as caught:
            os.lseek(fd, 3 * MIB, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO
        assert os.fstat(fd).st_blocks * 512 == MIB


def test_companions_are_beside_the_file(mounted: Mounted, source: Path) -> None:
    (source / "guest").write_bytes(b"pages")
    (source / "guest.seal").write_bytes(b"the seal")
    assert sorted(os.listdir(mounted.path)) == ["guest", "guest.seal"]
    assert (mounted.path / "guest.seal").read_bytes() == b"the seal"
    assert not (mounted.path / "guest.vm.json").exists()


def test_files_appear_and_disappear(mounted: Mounted, source: Path) -> None:
    assert os.listdir(mounted.path) == []
    (source / "guest").write_bytes(b"pages")
    assert os.listdir(mounted.path) == ["guest"]
    assert (mounted.path / "guest").read_bytes() == b"pages"
    (source / "guest").unlink()
    assert os.listdir(mounted.path) == []
    await_that(lambda: not (mounted.path / "guest").exists())


def test_an_open_file_stays_what_it_was_when_another_gets_its_name(
    mounted: Mounted, source: Path
) -> None:
    (source / "guest").write_bytes(content(2 * MIB, 1))
    with (mounted.path / "guest").open("rb") as file:
        assert file.read(PAGE) == content(2 * MIB, 1)[:PAGE]
        (source / "new").write_bytes(content(2 * MIB, 2))
        (source / "new").rename(source / "guest")
        await_that(lambda: (mounted.path / "guest").stat().st_ino != os.fstat(file.fileno()).st_ino)
        assert (mounted.path / "guest").read_bytes() == content(2 * MIB, 2)
        file.seek(MIB)
        assert file.read() == content(2 * MIB, 1)[MIB:]


def test_nothing_can_be_written(mounted: Mounted, source: Path) -> None:
    (source / "guest").write_bytes(b"pages")
    for attempt in (
        lambda: (mounted.path / "guest").open("r+b"),
        lambda: (mounted.path / "new").write_bytes(b""),
        lambda: (mounted.path / "guest").unlink(),
        lambda: (mounted.path / "guest").chmod(0o600),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EROFS


def test_damaged_bytes_are_an_error_and_a_message(mounted: Mounted, source: Path) -> None:
    (source / "guest").write_bytes(content(4 * MIB))
    (source / "guest.damaged").write_text(str(2 * MIB))
    fd = os.open(mounted.path / "guest", os.O_RDONLY)
    try:
        assert os.pread(fd, PAGE, 0) == content(4 * MIB)[:PAGE]
        with pytest.raises(OSError) as caught:
            os.pread(fd, PAGE, 3 * MIB)
        assert caught.value.errno == errno.EIO
    finally:
        os.close(fd)
    status = mounted.status()
    assert status["failed"] > 0
    assert "page 7 of pack 0123 is damaged" in status["messages"][-1]["text"]
    assert "guest: cannot read" in status["messages"][-1]["text"]


@mostly_one_way
def test_status_names_who_waits_for_what_while_the_store_is_stuck(
    mounted: Mounted, source: Path
) -> None:
    (source / "guest").write_bytes(content(8 * MIB))
    (source / "other").write_bytes(b"other")
    (source / "guest.gate").touch()
    with reading(mounted.path / "guest", 5 * MIB) as process:
        waits = []

        def waited() -> bool:
            waits[:] = [wait for wait in mounted.status()["waiting"] if wait["pid"] == process.pid]
            return bool(waits) and waits[0]["seconds"] > 0.1

        await_that(waited)
        assert (waits[0]["file"], waits[0]["work"]) == ("guest", "read")
        assert waits[0]["offset"] <= 5 * MIB < waits[0]["offset"] + waits[0]["length"]
        assert waits[0]["command"].startswith("python")
        assert (mounted.path / "other").read_bytes() == b"other"  # no other reader waits for it
        (source / "guest.gate").unlink()
        assert process.stdout is not None
        assert process.stdout.read() == "4096\n"
    await_that(lambda: not mounted.status()["waiting"])


@mostly_one_way
def test_many_stuck_readers_delay_nobody_else(mounted: Mounted, source: Path) -> None:
    (source / "guest").write_bytes(content(64 * MIB))
    (source / "other").write_bytes(b"other")
    (source / "guest.gate").touch()
    with contextlib.ExitStack() as stack:
        for number in range(8):
            stack.enter_context(reading(mounted.path / "guest", number * 8 * MIB))
        await_that(lambda: len({wait["pid"] for wait in mounted.status()["waiting"]}) >= 8)
        assert sorted(os.listdir(mounted.path)) == ["guest", "other"]
        assert (mounted.path / "other").read_bytes() == b"other"
        (source / "guest.gate").unlink()


@mostly_one_way
def test_reader_of_a_stuck_store_can_be_killed(mounted: Mounted, source: Path) -> None:
    (source / "guest").write_bytes(content(8 * MIB))
    (source / "guest.gate").touch()
    with reading(mounted.path / "guest", 5 * MIB) as process:
        await_that(lambda: bool(mounted.status()["waiting"]))
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
    (source / "guest.gate").unlink()
    assert (mounted.path / "guest").read_bytes() == content(8 * MIB)


@mostly_one_way
def test_a_signal_that_does_not_kill_is_no_error_of_a_page_fault(
    mounted: Mounted, source: Path
) -> None:
    (source / "guest").write_bytes(content(8 * MIB))
    (source / "guest.gate").touch()
    code = (
        "import mmap, signal, sys\n"
        "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "file = open(sys.argv[1], 'rb')\n"
        "memory = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)\n"
        "memory.madvise(mmap.MADV_RANDOM)\n"
        "print(memory[5 << 20], flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(mounted.path / "guest")], stdout=subprocess.PIPE, text=True
    )
    await_that(lambda: any(w["pid"] == process.pid for w in mounted.status()["waiting"]))
    for _ in range(5):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    (source / "guest.gate").unlink()
    assert process.communicate(timeout=20)[0] == f"{content(8 * MIB)[5 << 20]}\n"
    assert process.returncode == 0


def walk(path: Path, seed: int) -> subprocess.Popen[bytes]:
    """A process that touches all pages of a mapping in random order and prints their digest."""
    code = (
        "import hashlib, mmap, random, sys\n"
        "file = open(sys.argv[1], 'rb')\n"
        "memory = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)\n"
        "memory.madvise(mmap.MADV_RANDOM)\n"
        "pages = list(range(0, len(memory), 4096))\n"
        "random.Random(int(sys.argv[2])).shuffle(pages)\n"
        "copies = {page: memory[page : page + 4096] for page in pages}\n"
        "print(hashlib.sha256(b''.join(copies[page] for page in sorted(copies))).hexdigest())\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(seed)], stdout=subprocess.PIPE
    )


@both_ways
@pytest.mark.parametrize(
    ("kills", "size"),
    [(5, 8 * MIB), pytest.param(50, 96 * MIB, marks=pytest.mark.long)],
    ids=["5-kills", "50-kills"],
)
def test_killed_worker_costs_no_reader_a_byte(
    mounted: Mounted, source: Path, kills: int, size: int
) -> None:
    digest = hashlib.sha256(content(size)).hexdigest().encode()
    (source / "guest").write_bytes(content(size))
    killed, rounds = 0, 0
    while killed < kills:
        rounds += 1
        assert rounds < 100
        with (mounted.path / "guest").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        process = walk(mounted.path / "guest", rounds)
        before = mounted.status()["restarts"]
        kill_workers(mounted, kills - killed, process, rounds)
        assert process.communicate(timeout=200)[0].strip() == digest
        assert process.returncode == 0
        killed += mounted.status()["restarts"] - before
    assert mounted.status()["restarts"] == killed


@both_ways
def test_wait_of_a_request_goes_on_when_the_worker_is_killed(
    mounted: Mounted, source: Path
) -> None:
    (source / "guest").write_bytes(content(8 * MIB))
    (source / "guest.gate").touch()
    with reading(mounted.path / "guest", 0) as process:
        await_that(lambda: bool(mounted.status()["waiting"]))
        time.sleep(0.5)
        os.kill(mounted.worker(), signal.SIGKILL)
        await_that(lambda: mounted.status()["restarts"] == 1)
        await_that(lambda: any(w["seconds"] > 0.5 for w in mounted.status()["waiting"]))
        (source / "guest.gate").unlink()
        assert process.stdout is not None
        assert process.stdout.read() == "4096\n"


@mostly_one_way
def test_keeper_ends_with_its_mount(mounted: Mounted) -> None:
    subprocess.run(["umount", str(mounted.path)], check=True)
    assert mounted.process.wait(10) == 0


@mostly_one_way
def test_keeper_that_is_asked_to_end_serves_its_open_files_first(
    mounted: Mounted, source: Path
) -> None:
    (source / "guest").write_bytes(content(4 * MIB))
    with (mounted.path / "guest").open("rb") as file:
        mounted.process.terminate()
        await_that(lambda: not os.path.ismount(mounted.path))
        assert file.read() == content(4 * MIB)
        assert mounted.process.poll() is None
    assert mounted.process.wait(10) == 0


@mostly_one_way
def test_stuck_worker_does_not_outlive_its_mount(mounted: Mounted, source: Path) -> None:
    (source / "guest").write_bytes(content(4 * MIB))
    (source / "guest.gate").touch()
    with reading(mounted.path / "guest"):
        await_that(lambda: bool(mounted.status()["waiting"]))
    worker = mounted.worker()
    subprocess.run(["umount", "-l", str(mounted.path)], check=True)
    assert mounted.process.wait(10) == 0
    await_that(lambda: not Path(f"/proc/{worker}").exists())


def test_pushed_bytes_are_in_the_page_cache(source: Path, mount_point: Path) -> None:
    (source / "guest").write_bytes(content(8 * MIB))
    with (
        Mounted(source, mount_point, record=True) as mounted,
        (mount_point / "guest").open("rb") as file,
    ):
        ranges = [["guest", 5 * MIB, MIB], ["guest", 100, 10]]
        mounted.client.ask("push", ranges=ranges)
        await_that(lambda: mounted.status()["pushed"] == MIB + PAGE)
        (source / "guest.damaged").write_text("0")  # from now on nothing can be read
        assert os.pread(file.fileno(), MIB, 5 * MIB) == content(8 * MIB)[5 * MIB : 6 * MIB]
        assert os.pread(file.fileno(), PAGE, 0) == content(8 * MIB)[:PAGE]
        assert mounted.status()["reads"] == 0


def test_pushing_goes_on_in_the_next_worker(source: Path, mount_point: Path) -> None:
    (source / "guest").write_bytes(content(8 * MIB))
    with Mounted(source, mount_point) as mounted, (mount_point / "guest").open("rb"):
        (source / "guest.gate").touch()
        mounted.client.ask("push", ranges=[["guest", 0, 8 * MIB]])
        os.kill(mounted.worker(), signal.SIGKILL)
        (source / "guest.gate").unlink()
        await_that(lambda: mounted.status()["pushed"] == 8 * MIB)
