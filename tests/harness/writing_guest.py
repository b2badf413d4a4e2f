"""A guest that writes at a set speed, whose memory shows which instant a snapshot holds.

    setup = GuestSetup(machine="q35", ram=1 << 30, working_set=64 << 20, filled=512 << 20)
    with start(setup, directory, memory="memfd", rate=50e6) as guest:
        with GapRecorder(guest) as gaps:
            save(guest.socket, path)
        assert gaps.longest.seconds < 0.02
    with restore(setup, path, directory, mode="instant") as guest:
        guest.wait_for_writes()
        guest.assert_memory_held()

``writing_guest.c`` is the guest: it has the pattern, :func:`check_pattern` is its counterpart.
Every page that it rewrites is first compared with what it wrote there before, so the guest itself
finds a page that a restore got wrong.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pyqmigrate import open_snapshot
from pyqmigrate.qmp.client import QmpClient
from pyqmigrate.vm import sync
from pyqmigrate.vm.guest.ramblock import parse_ramblock
from tests.harness.beat import cpu_options
from tests.harness.freestanding import build_kernel
from tests.harness.huge_pages import HUGE_PAGE, huge_pages
from tests.harness.machine import BINARY, RAM_BLOCK

__all__ = [
    "MEMORY_KINDS",
    "PAGE",
    "GuestSetup",
    "Instant",
    "WritingGuest",
    "check_pattern",
    "check_snapshot",
    "completed_pages",
    "restore",
    "start",
]

PAGE = 4096
WORDS = PAGE // 8
FILLED = 0xFFFFFFFF
ZERO_EVERY = 8
MUL_GENERATION = 0x9E3779B97F4A7C15
MUL_PAGE = 0xC2B2AE3D27D4EB4F
MUL_WORD = 0x165667B19E3779F9
MEMORY_KINDS = ("memfd", "private", "tmpfs", "hugetlb", "instant")

_PROGRESS, _SETTINGS = 3 << 20, (3 << 20) + PAGE
_PROGRESS_FORMAT = struct.Struct("<QQQQQ")  # heartbeat, position, ticks, wrong, wrong_page
_SETTINGS_FORMAT = struct.Struct("<IIIIQQ")
_INTERVAL_OFFSET = 16
_UNSET = (0x7365747469732121, 0x2121736974746573)  # what the compiled settings begin with
# Guests with at least this much RAM have only the second number of bytes below 4 GiB.
_LOW_RAM = {
    "pc": (0xE0000000, 3 << 30),
    "q35": (0xB0000000, 2 << 30),
    "microvm": (3 << 30, 3 << 30),
}
_CHECKED_AT_ONCE = 4096  # pages
_PATIENCE = 60.0  # seconds

Pages = npt.NDArray[np.uint64]
Read = Callable[[int, int], Pages]  # first page, number of pages


@dataclass(frozen=True, order=True)
class Instant:
    """``written`` pages of the working set are of ``generation``, the others of the one before.

    A ``torn`` page lies between them: the guest was writing it. Later instants are greater.
    """

    generation: int
    written: int
    torn: bool = False


@dataclass(frozen=True)
class GuestSetup:
    """A machine and what its guest does; all sizes are bytes, multiples of a page.

    The guest rewrites ``working_set`` bytes of its RAM from offset ``first`` on, and once, before
    it begins, writes ``filled`` bytes behind them. With ``verify`` it compares pages before it
    rewrites them, which halves its highest speed.
    """

    machine: str = "q35"
    ram: int = 128 << 20
    working_set: int = 16 << 20
    filled: int = 0
    first: int = 4 << 20
    verify: bool = True
    accelerator: str = "tcg"

    def __post_init__(self) -> None:
        assert self.first >= 4 << 20, "the guest's program is there"
        assert self.first + self.working_set + self.filled <= self.ram, "RAM is too small"

    @property
    def first_page(self) -> int:
        return self.first // PAGE

    @property
    def working_pages(self) -> int:
        return self.working_set // PAGE

    @property
    def block(self) -> str:
        """The name of the RAM block."""
        return RAM_BLOCK[self.machine]

    def command(self, directory: Path, backend: str = "memory-backend-ram") -> list[str]:
        """The command line of its QEMU, without a monitor; its kernel is made in ``directory``."""
        return [
            BINARY,
            "-accel",
            self.accelerator,
            *(cpu_options() if self.accelerator == "kvm" else []),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-machine",
            f"{self.machine},memory-backend={self.block}",
            "-m",
            f"{self.ram >> 20}M",
            "-object",
            f"{backend},id={self.block},size={self.ram}",
            "-kernel",
            str(self._kernel(directory)),
        ]

    def _kernel(self, directory: Path) -> Path:
        limit, low = _LOW_RAM[self.machine]
        end = self.first_page + self.working_pages
        settings = _SETTINGS_FORMAT.pack(
            self.first_page,
            end,
            end + self.filled // PAGE,
            (low if self.ram >= limit else self.ram) // PAGE,
            0,
            self.verify,
        )
        image, offset = _image()
        name = f"writing-{self.machine}-{self.ram >> 20}-{self.first}-{self.working_set}-{self.filled}.elf"
        kernel = directory / name
        kernel.write_bytes(image[:offset] + settings + image[offset + len(settings) :])
        return kernel


class WritingGuest:
    """A running guest; a context manager that kills it.

    ``socket`` is a monitor that the test may hand to others, ``qmp`` is a session with another
    one. ``base`` is the snapshot that the guest's memory is mapped from, if it is.
    """

    def __init__(
        self,
        setup: GuestSetup,
        process: subprocess.Popen[bytes],
        sockets: tuple[Path, Path],
        stderr: Path,
        base: Path | None = None,
    ) -> None:
        self.setup, self.process, self.base = setup, process, base
        self.socket = sockets[0]
        self._stderr = stderr
        try:
            self.qmp = self._connect(sockets[1])
            self.ram_address = self._find_ram()
        except BaseException:
            self._kill()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def progress_address(self) -> int:
        """Where QEMU has the guest's heartbeat and position, two 64-bit words."""
        return self.ram_address + _PROGRESS

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; ``_`` in the names of arguments is ``-``."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self.qmp.execute(command, given or None)

    def heartbeat(self) -> int:
        return self._progress()[0]

    def position(self) -> Instant:
        """What the guest has written so far."""
        position = self._progress()[1]
        return Instant(position >> 32, position & 0xFFFFFFFF)

    def pages_written(self) -> int:
        """All pages of the working set that were written, since the first generation."""
        position = self.position()
        return (position.generation - 1) * self.setup.working_pages + position.written

    def set_rate(self, rate: float | None) -> None:
        """Have the guest write ``rate`` bytes a second from now on; None is as fast as it can.

        This writes the guest's memory from outside, which QEMU's dirty bitmap does not show: not
        while a save runs.
        """
        interval = 0 if rate is None else max(1, round(self._ticks_per_second() * PAGE / rate))
        self.write_ram(_SETTINGS + _INTERVAL_OFFSET, struct.pack("<Q", interval))

    def wait_for_writes(self, pages: int | None = None, limit: float = _PATIENCE) -> None:
        """Wait until the guest has written that many pages more; None is twice the working set."""
        wanted = self.setup.working_pages * 2 if pages is None else pages
        end = self.pages_written() + wanted
        self._wait(lambda: self.pages_written() >= end, limit)

    def wait_until_running(self, limit: float = _PATIENCE) -> None:
        """Wait until the guest's heart beats; right after a restore, for instance."""
        first = self.heartbeat()
        self._wait(lambda: self.heartbeat() != first, limit)

    def check_ram(self) -> Instant:
        """As :func:`check_pattern`, of the RAM that it has now; the guest must be stopped."""
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            buffer = np.empty((_CHECKED_AT_ONCE, WORDS), dtype="<u8")

            def read(first: int, count: int) -> Pages:
                part = buffer[:count]
                address = self.ram_address + first * PAGE
                assert os.preadv(memory.fileno(), [part.data], address) == part.nbytes
                return part

            return _check(read, self.setup)

    def read_ram(self) -> bytes:
        """Return all of its RAM, as it is now."""
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            return os.pread(memory.fileno(), self.setup.ram, self.ram_address)

    def assert_memory_held(self) -> None:
        """AssertionError if the guest found a page that was not as it had written it."""
        _, _, _, wrong, page = self._progress()
        assert wrong == 0, f"the guest found {wrong} wrong pages, the first of them {page:#x}"

    def save(self, path: Path, limit: float = _PATIENCE) -> None:
        """Stop the guest and have QEMU save it into a mapped-ram file, through multifd."""
        states = [{"capability": name, "state": True} for name in ("mapped-ram", "multifd")]
        self.execute("migrate-set-capabilities", capabilities=states)
        self.execute("migrate-set-parameters", max_bandwidth=0)
        self.execute("stop")
        self.execute("migrate", uri=f"file:{path}")
        self._wait(lambda: self.execute("query-migrate").get("status") == "completed", limit)

    def __enter__(self) -> WritingGuest:
        return self

    def __exit__(self, *_: object) -> None:
        self.qmp.close()
        self._kill()

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _connect(self, socket: Path) -> QmpClient:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return QmpClient.connect(socket, timeout=_PATIENCE)
            except (FileNotFoundError, ConnectionError):
                assert self.process.poll() is None, self._stderr.read_text(errors="replace")
                assert time.monotonic() < deadline, "QEMU does not open its monitor"
                time.sleep(0.002)

    def _find_ram(self) -> int:
        table = self.execute("human-monitor-command", command_line="info ramblock")
        return next(
            line.host_address for line in parse_ramblock(table) if line.name == self.setup.block
        )

    def _progress(self) -> tuple[int, ...]:
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            raw = os.pread(memory.fileno(), _PROGRESS_FORMAT.size, self.progress_address)
        return _PROGRESS_FORMAT.unpack(raw)

    def write_ram(self, offset: int, data: bytes) -> None:
        with Path(f"/proc/{self.pid}/mem").open("r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), data, self.ram_address + offset)

    def _ticks_per_second(self) -> float:
        """How fast the guest's time stamp counter runs; the guest must run."""
        self.wait_until_running()
        first, started_at = self._progress()[2], time.monotonic()
        time.sleep(0.05)
        self._wait(lambda: self._progress()[2] > first, 10)  # a busy host may not have run it yet
        last, ended_at = self._progress()[2], time.monotonic()
        return (last - first) / (ended_at - started_at)

    def _wait(self, done: Any, limit: float) -> None:
        deadline = time.monotonic() + limit
        while not done():
            assert self.process.poll() is None, self._stderr.read_text(errors="replace")
            assert time.monotonic() < deadline, f"the guest is still at {self.position()}"
            time.sleep(0.002)


def _save_one(setup: GuestSetup, directory: Path, path: Path, extra: Sequence[str] = ()) -> None:
    with start(setup, directory, extra=extra) as guest:
        guest.save(path)


@functools.cache
def _saved_once(setup: GuestSetup) -> Path:
    """A snapshot that many tests of this process begin with; it is removed when the process ends."""
    directory = Path(tempfile.mkdtemp(prefix="pyqmigrate-"))
    atexit.register(shutil.rmtree, directory)
    _save_one(setup, directory, directory / "base")
    return directory / "base"


@contextlib.contextmanager
def start(
    setup: GuestSetup,
    directory: Path,
    *,
    memory: str = "memfd",
    rate: float | None = None,
    extra: Sequence[str] = (),
) -> Iterator[WritingGuest]:
    """Start a guest and wait until all of its memory has its pattern; it ends on exit.

    memory: ``memfd``, ``tmpfs`` (a file) and ``hugetlb`` (a memfd) are shared, ``private`` is
        anonymous; ``instant`` maps a snapshot, made in ``directory`` beforehand, privately.
    rate: bytes that the guest writes a second; None is as fast as it can.
    extra: more arguments for QEMU.
    """
    assert memory in MEMORY_KINDS, memory
    with contextlib.ExitStack() as stack:
        if memory == "instant":
            base = directory / "base.mapped"
            if extra:  # files of one test
                _save_one(setup, directory, base, extra)
            else:
                subprocess.run(["cp", _saved_once(setup), base], check=True)  # keeps the holes
            guest = stack.enter_context(restore(setup, base, directory, extra=extra, paused=False))
            guest.set_rate(rate)
            yield guest
            return
        backend = {
            "memfd": "memory-backend-memfd,share=on",
            "private": "memory-backend-ram",
            "tmpfs": "memory-backend-file,share=on,mem-path=",
            "hugetlb": f"memory-backend-memfd,share=on,hugetlb=on,hugetlbsize={HUGE_PAGE}",
        }[memory]
        if memory == "tmpfs":
            if not os.access("/dev/shm", os.W_OK):
                pytest.skip("/dev/shm is not writable")
            file = stack.enter_context(tempfile.NamedTemporaryFile(dir="/dev/shm"))
            backend += file.name
        if memory == "hugetlb":
            stack.enter_context(huge_pages(setup.ram))
        sockets = _sockets(stack)
        stderr = sockets[0].with_name("stderr")
        command = [*setup.command(directory, backend), *_monitors(sockets), *extra]
        with stderr.open("wb") as errors:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=errors)
        guest = stack.enter_context(WritingGuest(setup, process, sockets, stderr))
        guest._wait(lambda: guest.position().generation >= 2, _PATIENCE)
        guest.set_rate(rate)
        yield guest


@contextlib.contextmanager
def restore(
    setup: GuestSetup,
    snapshot: Path,
    directory: Path,
    *,
    mode: str = "instant",
    backend: str = "memory-backend-ram",
    extra: Sequence[str] = (),
    **options: Any,
) -> Iterator[WritingGuest]:
    """Restore a guest of ``setup`` with :func:`pyqmigrate.vm.sync.restore`; it ends on exit."""
    with contextlib.ExitStack() as stack:
        sockets = _sockets(stack)
        stderr = sockets[0].with_name("stderr")
        command = [*setup.command(directory, backend), *_monitors(sockets), *extra]
        with stderr.open("wb") as errors:
            vm = sync.restore(
                snapshot, command, mode=mode, stdin=subprocess.DEVNULL, stderr=errors, **options
            )
        base = snapshot if mode == "instant" else None
        guest = WritingGuest(setup, vm.process, sockets, stderr, base)
        yield stack.enter_context(guest)


def check_pattern(memory: Any, setup: GuestSetup) -> Instant:
    """Return the instant at which the guest's RAM was ``memory``, any buffer.

    AssertionError if there is none: a page is stale, lost, misplaced or torn.
    """
    pages = np.frombuffer(memory, dtype="<u8", count=setup.ram // 8).reshape(-1, WORDS)
    return _check(lambda first, count: pages[first : first + count], setup)


def check_snapshot(path: Path, setup: GuestSetup) -> Instant:
    """As :func:`check_pattern`, of the guest's RAM in a snapshot; reads a few MiB at a time."""
    with open_snapshot(path) as snapshot:
        block = snapshot.blocks[setup.block]
        assert block.length == setup.ram

        def read(first: int, count: int) -> Pages:
            content = block.read(first * PAGE, count * PAGE)
            return np.frombuffer(content, dtype="<u8").reshape(-1, WORDS)

        return _check(read, setup)


def completed_pages(generation: int, first: int, count: int) -> Pages:
    """Return ``count`` pages, from page ``first`` on, as ``generation`` writes them."""
    number = np.arange(first, first + count, dtype=np.uint64)[:, None]
    word = np.arange(WORDS, dtype=np.uint64)[None, :]
    start = np.uint64(generation * MUL_GENERATION & 0xFFFFFFFFFFFFFFFF)
    pages = number * np.uint64(MUL_PAGE) + word * np.uint64(MUL_WORD) + start
    pages[:, 0] = np.uint64(generation) | number[:, 0] << np.uint64(32)
    pages[(number[:, 0] + np.uint64(generation)) % np.uint64(ZERO_EVERY) == 0] = 0
    return pages


def _check(read: Read, setup: GuestSetup) -> Instant:
    first, end = setup.first_page, setup.first_page + setup.working_pages
    filled_end = end + setup.filled // PAGE
    wrong = _prefix_end(read, end, filled_end, FILLED)
    assert wrong == filled_end, f"page {wrong:#x}, which the guest filled once, has changed"
    newest = max(
        int((part[:, 0] & np.uint64(0xFFFFFFFF)).max()) for _, part in _parts(read, first, end)
    )
    assert newest > 0, "no page of the working set has been written, or all were lost"
    # A generation whose first pages are zero has not shown its number yet.
    for generation in (newest, newest + 1):
        instant = _instant(read, first, end, generation)
        if instant is not None:
            return instant
    raise AssertionError(_first_differences(read, first, end, newest))


def _instant(read: Read, first: int, end: int, generation: int) -> Instant | None:
    new = _prefix_end(read, first, end, generation)
    written = new - first
    if new == end:
        return Instant(generation, written)
    if generation < 2:  # what was there before is unknown
        return None
    if _prefix_end(read, new + 1, end, generation - 1) != end:
        return None
    page = read(new, 1)[0]
    newer, older = (completed_pages(g, new, 1)[0] for g in (generation, generation - 1))
    if np.array_equal(page, older):
        return Instant(generation, written)
    words = int((page != newer).argmax())
    torn = np.array_equal(page[words:], older[words:])
    return Instant(generation, written, torn=True) if torn else None


def _prefix_end(read: Read, first: int, end: int, generation: int) -> int:
    """Return the first page from ``first`` on that is not of ``generation``, or ``end``."""
    for start, part in _parts(read, first, end):
        equal = (part == completed_pages(generation, start, len(part))).all(axis=1)
        if not equal.all():
            return start + int(equal.argmin())
    return end


def _parts(read: Read, first: int, end: int) -> Iterator[tuple[int, Pages]]:
    for start in range(first, end, _CHECKED_AT_ONCE):
        yield start, read(start, min(_CHECKED_AT_ONCE, end - start))


def _first_differences(read: Read, first: int, end: int, generation: int) -> str:
    newer, older, neither = 0, 0, []
    for start, part in _parts(read, first, end):
        new, old = (
            (part == completed_pages(g, start, len(part))).all(axis=1)
            for g in (generation, generation - 1)
        )
        newer, older = newer + int(new.sum()), older + int(old.sum())
        neither += [start + int(page) for page in np.flatnonzero(~new & ~old)]
    return (
        f"no instant of the guest has this memory: newest generation {generation}, "
        f"{newer} pages of it, {older} of the one before, {len(neither)} of neither, "
        f"first at pages {neither[:5]}"
    )


@functools.cache
def _image() -> tuple[bytes, int]:
    """The kernel, compiled once a session, and where in it the settings are."""
    constants = {
        "ZERO_EVERY": f"{ZERO_EVERY}",
        "MUL_GENERATION": f"{MUL_GENERATION:#x}UL",
        "MUL_PAGE": f"{MUL_PAGE:#x}UL",
        "MUL_WORD": f"{MUL_WORD:#x}UL",
    }
    places = {".progress": _PROGRESS, ".settings": _SETTINGS}
    with tempfile.TemporaryDirectory(prefix="writing-guest-") as directory:
        image = build_kernel(Path(directory), "writing_guest.c", constants, places).read_bytes()
    unset = struct.pack("<QQ", *_UNSET)
    assert image.count(unset) == 1
    return image, image.index(unset)


def _sockets(stack: contextlib.ExitStack) -> tuple[Path, Path]:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="writing-")))
    return directory / "qmp", directory / "harness.qmp"


def _monitors(sockets: tuple[Path, Path]) -> list[str]:
    return [word for path in sockets for word in ("-qmp", f"unix:{path},server=on,wait=off")]
