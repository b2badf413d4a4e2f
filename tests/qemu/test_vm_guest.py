"""What is found out about a real QEMU: its process, its memory, its devices."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pyqmigrate.errors import QemuError
from pyqmigrate.io.memory import FileMemory
from pyqmigrate.io.process_memory import ProcessMemory
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.vm.guest.inspect import GuestBlock, GuestInfo, inspect
from pyqmigrate.vm.plan.blockers import DeviceStateMethod
from pyqmigrate.vm.plan.engine import Engine, choose_engine
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.bare import BareQemu

pytestmark = pytest.mark.qemu

MIB = 1 << 20
RAM = 48 * MIB
PATTERN = b"a guest's page, " * 256


def backend(kind: str, *options: str, name: str = "ram0", size: int = 48) -> list[str]:
    return ["-object", ",".join((f"memory-backend-{kind},id={name},size={size}M", *options))]


def one(kind: str, *options: str, machine: str = "pc") -> list[str]:
    return ["-M", f"{machine},memory-backend=ram0", "-m", "48M", *backend(kind, *options)]


@contextlib.contextmanager
def looked(
    *arguments: str, run: bool = False, **more: object
) -> Iterator[tuple[BareQemu, GuestInfo]]:
    with (
        BareQemu(*arguments, run=run, **more) as qemu,  # type: ignore[arg-type]
        qemu.run(inspect) as guest,
    ):
        yield qemu, guest


def block_of(guest: GuestInfo, name: str) -> GuestBlock:
    return next(block for block in guest.blocks if block.name == name)


def written_into(qemu: BareQemu, block: GuestBlock, at: int) -> None:
    """PATTERN in QEMU's own address space."""
    with Path(f"/proc/{qemu.process.pid}/mem").open("r+b", buffering=0) as memory:
        assert os.pwrite(memory.fileno(), PATTERN, block.host_address + at) == len(PATTERN)


def read_back(block: GuestBlock, at: int) -> bytes:
    assert isinstance(block.memory, FileMemory)
    return os.pread(block.memory.fd, len(PATTERN), block.memory.offset + at)


@pytest.fixture
def ram_file(tmp_path: Path) -> Path:
    path = tmp_path / "a name, with spaces and a\u00df"
    path.touch()
    os.truncate(path, RAM + MIB)
    return path


@pytest.mark.parametrize("machine", ["pc", "q35", "microvm"])
@pytest.mark.parametrize(
    ("kind", "options", "file_backed"),
    [
        ("ram", ["share=on"], False),
        ("memfd", ["share=on"], False),
        ("shm", [], False),
        ("file", ["share=on", "mem-path=/dev/shm"], True),
    ],
)
def test_shared_memory_is_read_through_its_file(
    machine: str, kind: str, options: list[str], file_backed: bool
) -> None:
    with looked(*one(kind, *options, machine=machine)) as (qemu, guest):
        block = block_of(guest, "ram0")
        written_into(qemu, block, 20 * MIB)
        assert read_back(block, 20 * MIB) == PATTERN
        assert (block.length, block.shared, block.file_backed) == (RAM, True, file_backed)
        assert block.backend == f"memory-backend-{kind}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-M", "pc", "-m", "48M"],
        ["-M", "q35", "-m", "48M", "-mem-path", "/dev/shm"],
        one("ram"),
        one("memfd", "share=off"),
        one("file", "share=off", "mem-path=/dev/shm"),
    ],
)
def test_private_memory_is_the_process(arguments: list[str]) -> None:
    with looked(*arguments) as (qemu, guest):
        block = max(guest.blocks, key=lambda block: block.length)
        assert block.memory == ProcessMemory(qemu.process.pid, block.host_address, RAM)
        assert not block.shared and not block.file_backed and not block.why_not


def test_file_with_an_odd_name_and_an_offset_is_found(ram_file: Path) -> None:
    name = str(ram_file).replace(",", ",,")
    with looked(*one("file", "share=on", f"mem-path={name}", "offset=1M")) as (qemu, guest):
        block = block_of(guest, "ram0")
        written_into(qemu, block, 8 * MIB)
        assert isinstance(block.memory, FileMemory) and block.memory.offset == MIB
        assert ram_file.read_bytes()[9 * MIB :][: len(PATTERN)] == PATTERN
        assert read_back(block, 8 * MIB) == PATTERN


def test_unlinked_file_is_found(ram_file: Path) -> None:
    name = str(ram_file).replace(",", ",,")
    with BareQemu(*one("file", "share=on", f"mem-path={name}")) as qemu:
        qemu.run(_nothing)
        ram_file.unlink()
        with qemu.run(inspect) as guest:
            block = block_of(guest, "ram0")
            written_into(qemu, block, 0)
            assert read_back(block, 0) == PATTERN


async def _nothing(monitor: Monitor) -> None:
    await monitor.execute("query-status")


def test_file_replaced_by_another_of_its_name_is_not_mistaken(ram_file: Path) -> None:
    name = str(ram_file).replace(",", ",,")
    with BareQemu(*one("file", "share=on", f"mem-path={name}")) as qemu:
        qemu.run(_nothing)
        ram_file.rename(ram_file.with_name("moved"))
        ram_file.write_bytes(bytes(RAM))
        with qemu.run(inspect) as guest:
            block = block_of(guest, "ram0")
            written_into(qemu, block, MIB)
            assert read_back(block, MIB) == PATTERN


def test_descriptors_are_read_only_and_closed() -> None:
    with BareQemu(*one("memfd", "share=on")) as qemu:
        before = set(Path("/proc/self/fd").iterdir())
        with qemu.run(inspect) as guest:
            memory = block_of(guest, "ram0").memory
            assert isinstance(memory, FileMemory)
            with pytest.raises(OSError):
                os.pwrite(memory.fd, b"x", 0)
        assert set(Path("/proc/self/fd").iterdir()) == before


NUMA = [
    "-M",
    "q35",
    "-m",
    "48M",
    *backend("memfd", "share=on", name="left", size=32),
    *backend("ram", name="right", size=16),
    "-numa",
    "node,memdev=left",
    "-numa",
    "node,memdev=right",
    "-smp",
    "2",
]


def test_numa_nodes_are_blocks_of_their_own() -> None:
    with looked(*NUMA) as (_, guest):
        left, right = block_of(guest, "left"), block_of(guest, "right")
        assert isinstance(left.memory, FileMemory) and left.length == 32 * MIB
        assert isinstance(right.memory, ProcessMemory) and right.length == 16 * MIB


def test_block_named_by_its_object_path_has_its_backend() -> None:
    arguments = one("file", "share=on", "mem-path=/dev/shm")
    arguments[-1] += ",x-use-canonical-path-for-ramblock-id=on"
    with looked(*arguments) as (_, guest):
        assert block_of(guest, "/objects/ram0").file_backed


VIRTIO = [
    "-M",
    "q35",
    "-m",
    "48M",
    "-device",
    "virtio-vga",
    "-device",
    "virtio-net-pci",
    "-device",
    "virtio-balloon",
    "-device",
    "qemu-xhci",
]
SPARE = backend("ram", name="spare", size=16)


@pytest.mark.parametrize(
    "arguments",
    [
        VIRTIO,
        NUMA,
        ["-M", "pc", "-m", "48M", "-vga", "std"],
        one("ram", machine="microvm"),
        ["-M", "pc", "-m", "48M", *SPARE],
    ],
    ids=["q35-virtio", "numa", "pc-vga", "microvm", "unused-backend"],
)
def test_blocks_are_those_of_a_stream(arguments: Sequence[str], tmp_path: Path) -> None:
    path = tmp_path / "stream"

    async def save(monitor: Monitor) -> None:
        wanted = [{"capability": "mapped-ram", "state": True}]
        await monitor.execute("migrate-set-capabilities", {"capabilities": wanted})
        await monitor.execute("migrate", {"uri": f"file:{path}"})
        while (await monitor.execute("query-migrate"))["status"] != "completed":
            await asyncio.sleep(0.01)

    with BareQemu(*arguments) as qemu:
        with qemu.run(inspect) as guest:
            named = [(block.name, block.length) for block in guest.blocks]
            machine = guest.machine
        qemu.run(save)
    with open_snapshot(path) as snapshot:
        assert named == [(block.name, block.length) for block in snapshot.blocks.values()]
        assert machine == snapshot.stream.machine


def test_guest_is_described() -> None:
    uuid = "5d1f3a52-3f0a-4a0c-a1cf-6c2b6f2ad1f3"
    with looked("-M", "q35", "-m", "48M", "-uuid", uuid) as (qemu, guest):
        assert guest.pid == qemu.process.pid
        assert Path(guest.binary).name.startswith("qemu-system-")
        assert guest.machine.startswith("pc-q35-")
        assert (guest.target, guest.target_page_bits, guest.uuid) == ("x86_64", 12, uuid)
        assert (guest.run_state, guest.running) == ("prelaunch", False)
        assert guest.migration_status == "none" and guest.blocked_reasons == ()
        assert guest.capabilities["mapped-ram"] is False
        assert guest.parameters["multifd-channels"] == 2


def test_long_socket_path_is_reached(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    # A UNIX socket's name has 108 bytes at most, so QEMU is told a short one.
    fd = os.open(deep, os.O_PATH)
    try:
        monitor = ["-qmp", f"unix:/proc/self/fd/{fd}/s,server=on,wait=off"]
        with looked("-M", "pc", "-m", "48M", socket=deep / "s", monitor=monitor, fds=[fd]) as found:
            assert found[1].pid == found[0].process.pid
    finally:
        os.close(fd)


def test_socket_of_a_manager_is_not_taken_for_qemu(tmp_path: Path) -> None:
    """The peer that the kernel names is who called listen(): this test."""
    path = tmp_path / "handed-in"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        fd = listener.fileno()
        monitor = [
            "-chardev",
            f"socket,id=qmp,fd={fd},server=on,wait=off",
            "-mon",
            "qmp,mode=control",
        ]
        with looked("-M", "pc", "-m", "48M", socket=path, monitor=monitor, fds=[fd]) as (
            qemu,
            guest,
        ):
            assert guest.pid == qemu.process.pid != os.getpid()
            assert isinstance(block_of(guest, "pc.ram").memory, ProcessMemory)


def _may_unshare() -> bool:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_process_in_a_pid_namespace_below_ours_is_found() -> None:
    if not _may_unshare():
        pytest.skip("no new pid namespace may be made here")
    before = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with looked(*one("memfd", "share=on"), before=before) as (qemu, guest):
        assert guest.pid is not None and guest.pid != qemu.process.pid
        assert "qemu-system" in Path(f"/proc/{guest.pid}/cmdline").read_text()
        assert isinstance(block_of(guest, "ram0").memory, FileMemory)


def test_memory_out_of_reach_says_what_is_missing() -> None:
    """As a user who is not QEMU's: its process can neither be looked at nor read."""
    if os.geteuid() != 0:
        pytest.skip("needs two users")
    program = (
        "import asyncio, concurrent.futures.thread, os, sys\n"
        "from pyqmigrate.vm.qemu.monitor import Monitor\n"
        "from pyqmigrate.vm.guest.inspect import inspect\n"
        "from pyqmigrate.vm.plan.engine import choose_engine\n"
        "os.setgid(65534); os.setuid(65534)  # after all imports: those may be root's alone\n"
        "async def main():\n"
        "    async with await Monitor.connect(sys.argv[1]) as monitor:\n"
        "        with await inspect(monitor) as guest:\n"
        "            print(choose_engine(guest).engine, guest.blocks[0].memory)\n"
        "            print(guest.blocks[0].why_not)\n"
        "asyncio.run(main())\n"
    )
    with BareQemu(*one("memfd", "share=on")) as qemu:
        qemu.run(_nothing)
        qemu.directory.chmod(0o755)
        qemu.socket.chmod(0o777)
        done = subprocess.run(
            [sys.executable, "-c", program, str(qemu.socket)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("qemu None\n")
        assert "CAP_SYS_PTRACE" in done.stdout


def test_monitor_held_by_another_client_is_an_error_within_five_seconds() -> None:
    with BareQemu("-M", "pc", "-m", "48M") as qemu:

        async def second(first: Monitor) -> str:
            with pytest.raises(QemuError, match="another client holds it") as caught:
                await Monitor.connect(qemu.socket)
            return str(caught.value)

        start = time.monotonic()
        qemu.run(second)
        assert time.monotonic() - start < 6


@contextlib.contextmanager
def full_queue(path: Path) -> Iterator[list[socket.socket]]:
    """Clients that wait for a monitor, as many as may."""
    clients: list[socket.socket] = []
    try:
        while True:
            clients.append(socket.socket(socket.AF_UNIX))
            clients[-1].setblocking(False)
            try:
                clients[-1].connect(str(path))
            except BlockingIOError:
                break
        yield clients
    finally:
        for client in clients:
            client.close()


def test_monitor_for_which_too_many_clients_wait_is_held_by_another() -> None:
    with BareQemu("-M", "pc", "-m", "48M") as qemu:

        async def one_too_many(first: Monitor) -> None:
            with full_queue(qemu.socket):
                start = time.monotonic()
                with pytest.raises(QemuError, match="another client holds it"):
                    await Monitor.connect(qemu.socket, timeout=1)
                assert 0.9 < time.monotonic() - start < 2

        qemu.run(one_too_many)


def test_monitor_is_reached_when_the_others_have_left() -> None:
    with BareQemu("-M", "pc", "-m", "48M") as qemu:

        async def patient(first: Monitor) -> None:
            with full_queue(qemu.socket):
                waiting = asyncio.ensure_future(Monitor.connect(qemu.socket))
                await asyncio.sleep(0.3)
                await first.close()
            async with await waiting as monitor:
                assert (await monitor.execute("query-status"))["status"] == "prelaunch"

        qemu.run(patient)


# The choice of the engine, as a real QEMU makes it.

FILE = one("file", "share=on", "mem-path=/dev/shm")


def test_running_guest_with_a_shared_file_is_left_out_by_migrate() -> None:
    with looked(*FILE, run=True) as (_, guest):
        choice = choose_engine(guest)
        assert (choice.engine, choice.way, choice.stays) == (
            Engine.DIRECT,
            DeviceStateMethod.IGNORE_SHARED,
            True,
        )


@pytest.mark.parametrize("arguments", [FILE, one("memfd"), ["-M", "pc", "-m", "48M"]])
def test_guest_that_does_not_run_stays_as_it_is(arguments: list[str]) -> None:
    with looked(*arguments) as (_, guest):
        choice = choose_engine(guest)
        assert (choice.engine, choice.way, choice.stays) == (
            Engine.DIRECT,
            DeviceStateMethod.DEVICES_ONLY,
            True,
        )


MEMORY_DEVICE = [
    "-M",
    "q35",
    "-m",
    "48M,slots=1,maxmem=256M",
    *backend("ram", name="vm", size=64),
    "-device",
    "virtio-mem-pci,memdev=vm,id=plugged",
]


def test_virtio_mem_is_left_to_qemu() -> None:
    with looked(*MEMORY_DEVICE) as (_, guest):
        choice = choose_engine(guest)
        assert choice.engine is Engine.QEMU and not choice.stays
        assert any("plugged (virtio-mem-pci)" in reason for reason in choice.refused)


def test_blocked_guest_cannot_be_saved() -> None:
    peer = [*backend("ram", "share=on", name="iv", size=16), "-device", "ivshmem-plain,memdev=iv"]
    with looked("-M", "pc", "-m", "48M", *peer) as (_, guest):
        assert "peer mode" in guest.blocked_reasons[0]
        for engine in ("auto", "direct", "qemu"):
            with pytest.raises(QemuError, match="peer mode"):
                choose_engine(guest, engine=engine)


def test_guest_not_there_yet_cannot_be_saved() -> None:
    incoming = looked("-M", "pc", "-m", "48M", "-incoming", "defer")
    with incoming as (_, guest), pytest.raises(QemuError, match="incoming"):
        choose_engine(guest)


def test_dirty_bitmaps_are_left_to_qemu_when_they_migrate(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    drive = ["-blockdev", f"driver=file,filename={disk},node-name=disk"]

    async def with_bitmap(monitor: Monitor) -> GuestInfo:
        await monitor.execute("block-dirty-bitmap-add", {"node": "disk", "name": "changed"})
        wanted = [{"capability": "dirty-bitmaps", "state": True}]
        await monitor.execute("migrate-set-capabilities", {"capabilities": wanted})
        return await inspect(monitor)

    with BareQemu("-M", "pc", "-m", "48M", *drive) as qemu, qemu.run(with_bitmap) as guest:
        assert guest.dirty_bitmaps == (("disk", "changed"),)
        assert any("changed of disk" in reason for reason in choose_engine(guest).refused)


def test_looking_changes_nothing() -> None:
    with BareQemu(*FILE, run=True) as qemu:

        async def state(monitor: Monitor) -> list[object]:
            asked = (
                "query-status",
                "query-migrate",
                "query-fdsets",
                "query-migrate-capabilities",
                "query-migrate-parameters",
                "query-named-block-nodes",
            )
            return [await monitor.execute(command) for command in asked]

        before = qemu.run(state)
        qemu.run(inspect).close()
        assert qemu.run(state) == before


class LyingProxy:
    """Everything is the QEMU's behind it but its threads and addresses: those are a victim's.

    It stands for a QEMU that its guest has taken over.
    """

    def __init__(self, path: Path, real: Path, pid: int, address: int) -> None:
        self._real, self._pid, self._address = real, pid, address
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> LyingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        with client, socket.socket(socket.AF_UNIX) as real:
            real.connect(str(self._real))
            up = threading.Thread(target=self._pass_up, args=(client, real))
            up.start()
            with real.makefile("rb") as lines:
                for line in lines:
                    with contextlib.suppress(OSError):
                        client.sendall(self._lie(line))
            up.join()

    @staticmethod
    def _pass_up(client: socket.socket, real: socket.socket) -> None:
        while data := client.recv(65536):
            real.sendall(data)
        real.shutdown(socket.SHUT_RDWR)

    def _lie(self, line: bytes) -> bytes:
        line = re.sub(rb'"thread-id": \d+', b'"thread-id": %d' % self._pid, line)
        numbers = rb"(0x[0-9a-f]{16} 0x[0-9a-f]{16} 0x[0-9a-f]{16} )0x[0-9a-f]{16}"
        return re.sub(numbers, lambda m: m[1] + b"0x%016x" % self._address, line)


def test_qemu_that_points_at_another_process_has_that_not_read(tmp_path: Path) -> None:
    """A process of the same user, which a look by root could read in any case."""
    victim = (
        "import ctypes, mmap, sys\n"
        "memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)\n"
        "sys.stdin.read()\n"
    )
    path = tmp_path / "proxy"

    async def looked() -> tuple[GuestInfo, str]:
        async with await Monitor.connect(path) as monitor:
            guest = await inspect(monitor)
        with guest:
            return guest, "; ".join(choose_engine(guest).refused)

    with (
        BareQemu("-M", "pc", "-m", "48M") as qemu,
        subprocess.Popen(
            [sys.executable, "-c", victim], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process,
    ):
        qemu.run(_nothing)
        assert process.stdin is not None and process.stdout is not None
        address = int(process.stdout.readline())
        with LyingProxy(path, qemu.socket, process.pid, address):
            guest, why = asyncio.run(looked())
        process.stdin.close()
    assert guest.pid is None
    assert all(block.memory is None for block in guest.blocks)
    assert f"process {process.pid} is not at the other end of the monitor's socket" in why
