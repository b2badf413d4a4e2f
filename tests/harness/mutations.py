"""Damages files of every kind and runs every verb on them.

Each mutation is looked at in a child, forked from a process that has imported everything; a verb
has to end within a limit of time and memory, with a result or with an error of the package's. By
hand::

    python -m tests.harness.mutations DIRECTORY --first SEED --count 1
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gc
import gzip
import io
import json
import lzma
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from pyqmigrate import (
    FileMemory,
    MappedRamSnapshot,
    PyqmigrateError,
    RamBlock,
    compact,
    open_snapshot,
)
from pyqmigrate.cli import main as command
from pyqmigrate.format.device.sections import DeviceSection, encode_devices
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from pyqmigrate.format.postcopy.stream import PostcopyBlock, encode_head, encode_package
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.mount.files import open_files
from pyqmigrate.mount.nodes import Nodes
from pyqmigrate.page_server.blocks import ServedBlock
from pyqmigrate.page_server.sources import open_source
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.sequential import SequentialWriter
from pyqmigrate.snapshot.save.writer import SaveOptions, Sparse
from pyqmigrate.store import Store, verify
from pyqmigrate.vm.incoming.incoming_stream import IncomingStream
from pyqmigrate.vm.incoming.source import RestoreSource
from tests.harness.device_example import BODY, RTC
from tests.harness.increment_files import save_increment
from tests.harness.snapshots import ram
from tests.harness.stream_mutations import Anatomy, dissect, mutate

__all__ = ["outcomes"]

SECONDS = 2.0  # of the processor, for one verb
MEMORY = 300 << 10  # KiB, over what the child had from the start
TIME_LIMIT = 60.0  # seconds for one mutation
KILLED_AT = 1 << 20  # KiB: before the machine suffers
STREAMED = 256 << 20  # bytes of guest memory that a sequential stream is written of
LOADED = 64 << 20
CODES = {0, 1, 2, 3, 5}  # of the command; 4 is for guests, and there is none
VERBS_A_FILE = 5
TIMES = (1, 1)  # nanoseconds: of the last access and modification of every file

SECTIONS, DESCRIPTION = encode_devices([DeviceSection("rtc", BODY, 0, 3, RTC)], 4096)
BLOCKS = [RamBlock("pc.ram", ram(200, seed=4)), RamBlock("vga.vram", ram(40, seed=5))]
HEADER = LibvirtHeader(True, 2, ImageFormat.RAW, True, "<domain/>", "<c/>", 300, "little")
COMPRESS: dict[ImageFormat, Callable[[bytes], bytes]] = {
    ImageFormat.GZIP: gzip.compress,
    ImageFormat.BZIP2: bz2.compress,
    ImageFormat.XZ: lzma.compress,
    ImageFormat.ZSTD: zstandard.compress,
}


# ---- what is damaged ----


@dataclass(frozen=True)
class Base:
    """``files`` by name, all there; ``damaged`` is the one that is. ``index`` is given to verbs
    that take one."""

    files: dict[str, bytes]
    damaged: str
    anatomy: Anatomy
    index: bool = False


def mapped(path: Path, seal: bool = False, offset: int = 0) -> None:
    target = f"file:{path},offset={offset}" if offset else str(path)
    writer = Writer(
        target,
        BLOCKS,
        SaveOptions(direct_io=DirectIO.OFF, sparse=Sparse.EXACT, channels=1, machine="pc-q35-10.0"),
    )
    writer.run(SECTIONS, DESCRIPTION)
    if seal:
        assert command(["seal", str(path)]) == 0


def increment(directory: Path, path: Path) -> None:
    """An increment at ``path``, and its base beside it, modified when all files here are."""
    base = directory / "base"
    mapped(base)
    os.utime(base, ns=TIMES)
    changed = np.zeros(200, bool)
    changed[::7] = True
    save_increment(
        path,
        base,
        {"pc.ram": ram(200, seed=6), "vga.vram": ram(40, seed=7)},
        {"pc.ram": changed},
        sections=SECTIONS,
        description=DESCRIPTION,
        direct_io=DirectIO.OFF,
        channels=1,
    )


def sequential(path: Path) -> None:
    SequentialWriter(str(path), BLOCKS, SaveOptions(machine="pc-q35-10.0")).run(
        SECTIONS, DESCRIPTION
    )


def flat(data: bytes) -> Anatomy:
    """Of a file that has no numbers at known places: any byte may be one."""
    fields = [(at, width) for at in range(0, min(len(data), 400), 4) for width in (1, 4, 8)]
    return Anatomy(fields, [(0, len(data)), (0, min(len(data), 400))], [len(data), 4096, 1 << 20])


def bases(directory: Path) -> dict[str, Base]:
    found, path = {}, directory / "file"

    def add(name: str, *, damaged: str = "file", offset: int = 0, index: bool = False) -> None:
        files = {entry.name: entry.read_bytes() for entry in directory.iterdir()}
        whole = damaged == "file" and name not in ("compressed", "piped")
        data = files[damaged]
        anatomy = dissect(data, path, offset) if whole else flat(data)
        found[name] = Base(files, damaged, anatomy, index)
        for entry in directory.iterdir():
            entry.unlink()

    mapped(path)
    add("mapped-ram")
    sequential(path)
    add("sequential")
    sequential(path)
    path.write_bytes(encode_header(HEADER) + path.read_bytes())
    add("libvirt, raw")
    head = LibvirtHeader(True, 2, ImageFormat.SPARSE, True, "<domain/>", "<c/>", 300, "little")
    path.write_bytes(encode_header(head))
    mapped(path, offset=300)
    add("libvirt, sparse")
    for form, compress in COMPRESS.items():
        sequential(path)
        header = LibvirtHeader(True, 2, form, True, "<domain/>", "<c/>", 300, "little")
        path.write_bytes(encode_header(header) + compress(path.read_bytes()))
        files = {"file": path.read_bytes()}
        found[f"libvirt, {form.name.lower()}"] = Base(files, "file", flat(files["file"]))
        path.unlink()
    mapped(path)
    compact(path, directory / "compact")
    (directory / "compact").replace(path)
    found["compact"] = Base({"file": path.read_bytes()}, "file", flat(path.read_bytes()))
    path.unlink()
    mapped(path, seal=True)
    add("seal", damaged="file.seal")
    mapped(path, seal=True)
    add("sealed")
    sequential(path)
    with open_snapshot(path, index=directory / "index") as snapshot:
        snapshot.blocks["pc.ram"].read(0, 4096)
    add("index", damaged="index", index=True)
    increment(directory, path)
    add("increment")
    increment(directory, path)
    add("base of an increment", damaged="base")
    return found


# ---- what is done with it ----

Verb = Callable[[Path, bool], int]


def command_line(*words: str, index: bool = True) -> Verb:
    """``DIR`` stands for the directory."""

    def run(directory: Path, with_index: bool) -> int:
        given = [word.replace("DIR", str(directory)) for word in words]
        if with_index and index:
            given += ["--index", str(directory / "index")]
        if given[-2:] == ["--to", "stream"] and claimed(directory) > STREAMED:
            return 0  # it has a record for each page that the file claims
        return command(given)

    return run


def claimed(directory: Path) -> int:
    """Bytes of guest memory."""
    try:
        with open_snapshot(directory / "file") as snapshot:
            return sum(block.length for block in snapshot.blocks.values())
    except PyqmigrateError:
        return 0


def load(directory: Path, _: bool) -> int:
    """Of what is not too long, into a buffer or a file for each block."""
    if claimed(directory) > LOADED:
        return 0
    with contextlib.ExitStack() as stack:
        snapshot = stack.enter_context(open_snapshot(directory / "file"))
        memories: dict[str, bytearray | FileMemory] = {}
        for number, block in enumerate(snapshot.blocks.values()):
            if number % 2:
                fd = os.memfd_create("memory")
                stack.callback(os.close, fd)
                os.truncate(fd, block.length)
                memories[block.name] = FileMemory(fd)
            else:
                memories[block.name] = bytearray(block.length)
        snapshot.load(memories)
    return 0


def compare(directory: Path, _: bool) -> int:
    """With a copy, so that its content is read: one file would be equal to itself."""
    other = directory / "to"
    shutil.copyfile(directory / "file", other)
    try:
        return command(["diff", str(directory / "file"), str(other), "--pages", "--fields"])
    finally:
        other.unlink()


def restore(directory: Path, _: bool) -> int:
    """What ``vm restore`` reads before a QEMU does: the snapshot, its seal, the incoming stream."""
    source = RestoreSource(str(directory / "file"), None)
    try:
        sealed = source.clear_pages_are_zero()
        source.close_reading(source.choose_reading(None, DirectIO.AUTO))
        assert isinstance(source.snapshot, MappedRamSnapshot)
        companion = IncomingStream(
            source.snapshot, source.fd, [*source.snapshot.blocks], sealed=sealed
        )
        try:
            companion.build()
        finally:
            companion.close()
    finally:
        source.close()
    return 0


def serve_pages(directory: Path, _: bool) -> int:
    """What ``page-server`` reads and sends: the state, and some pages of each block."""
    with open_source(directory / "file") as source:
        state = source.state
        blocks = [PostcopyBlock(spec, max(4096, spec.page_size)) for spec in state.blocks]
        encode_head(state.settings, blocks, state.early)
        encode_package(state.devices)
        for number, block in enumerate(blocks):
            with contextlib.closing(ServedBlock(number, block, source.data(number))) as served:
                start = 0
                for _ in range(20):
                    window = served.next_window(start, 64)
                    if window is None:
                        break
                    first, start = window
                    source.read(number, first, start - first)
    return 0


def add_to_store(directory: Path, _: bool) -> int:
    """``store add``: the store is intact, whatever the file."""
    with Store.create(directory / "store") as store:
        code = command(["store", "add", store.name, str(directory / "file"), "--name", "a"])
        assert verify(store).intact
        assert store.names() == ([] if code else ["a"])
    shutil.rmtree(directory / "store")
    return code


PIECE, SHOWN = 128 << 10, 16 << 20  # bytes that a mount reads together, and of a run of data here


def show(directory: Path, _: bool) -> int:
    """What a ``mount`` of the file shows: every name, and the bytes of each, past the end too."""
    with contextlib.closing(open_files(str(directory / "file"))) as files:
        nodes = Nodes(files, (), lambda node: None)
        for name in files.names():
            node = nodes.find(name)
            assert node is not None
            file = nodes.acquire(node.number)
            position = file.next_data(0)
            while position is not None:
                end = file.next_hole(position)
                assert position < end, (position, end)
                for offset in range(position, min(end, position + SHOWN), PIECE):
                    assert len(file.read(offset, PIECE)) <= PIECE
                position = file.next_data(end) if end < file.size else None
            nodes.release(node.number)
    return 0


def fleet_add(directory: Path, _: bool) -> int:
    """``fleet add``: the store is intact, whatever the file."""
    with Store.create(directory / "store") as store:
        words = ["fleet", "add", str(directory / "file"), "--store", store.name, "--jobs", "1"]
        code = command(words)
        assert verify(store).intact
        assert store.names() == ([] if code else ["file"])
    shutil.rmtree(directory / "store")
    return code


VERBS: dict[str, Verb] = {
    "info": command_line("info", "DIR/file"),
    "info --json": command_line("info", "DIR/file", "--json"),
    "verify": command_line("verify", "DIR/file"),
    "verify --json": command_line("verify", "DIR/file", "--json"),
    "devices": command_line("devices", "DIR/file"),
    "fleet verify": command_line("fleet", "verify", "DIR/file", "--jobs", "1", index=False),
    "fleet info": command_line("fleet", "info", "DIR", "--jobs", "1", index=False),
    "seal": command_line("seal", "DIR/file", index=False),
    "unpack": command_line("unpack", "DIR/file", "DIR/raw"),
    **{
        f"convert --to {form}": command_line("convert", "DIR/file", "DIR/to", "--to", form)
        for form in ("mapped-ram", "stream", "raw", "elf", "lime")
    },
    "compact": command_line("compact", "DIR/file", "DIR/to"),
    "diff": compare,
    "find": command_line("find", "DIR/file", "ab"),
    "find zeros": command_line("find", "DIR/file", "0000", "--hex", "--count", "--json"),
    "find --regex": command_line("find", "DIR/file", "[a-c]{3}", "--regex", "--context", "9"),
    "find at addresses": command_line("find", "DIR/file", "a", "--address-range", "0-64M"),
    "strings": command_line("strings", "DIR/file", "-n", "6", "--json"),
    "strings --utf-16": command_line("strings", "DIR/file", "--utf-16"),
    "read": command_line("read", "DIR/file", "pc.ram:0x3000", "65536"),
    "read at an address": command_line("read", "DIR/file", "@0x3000", "65536", "--json"),
    "map": command_line("map", "DIR/file", index=False),
    "map --json --by": command_line("map", "DIR/file", "--json", "--by", "block", index=False),
    "map OTHER": command_line("map", "DIR/file", "DIR/file", "--cells", "64", index=False),
    **{
        f"map --{form}": command_line("map", "DIR/file", f"--{form}", "DIR/to", index=False)
        for form in ("html", "svg")
    },
    "store add": add_to_store,
    "fleet add": fleet_add,
    "mount": show,
    "page-server": serve_pages,
    "load": load,
    "vm restore": restore,
}


class TooSlow(Exception):
    """A verb took more of the processor than it may."""


def run_verbs(directory: Path, base: Base, names: list[str]) -> dict[str, int]:
    """The exit code of each; the package's errors from what is not the command count as 1."""
    codes = {}
    for name in names:
        started = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                code = VERBS[name](directory, base.index)
            except PyqmigrateError:
                code = 1
        took = time.process_time() - started
        if took > SECONDS:
            raise TooSlow(f"{name}: {took:.1f} s")
        if code not in CODES:
            raise AssertionError(f"{name}: exit code {code}")
        codes[name] = code
        left = [path.name for path in directory.rglob("*.partial")]
        if left or (code and (directory / "to").exists()):
            raise AssertionError(f"{name} has failed with {code}, and left {left or 'its target'}")
        for entry in directory.iterdir():
            if entry.name in ("to", "raw"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return codes


# ---- children ----


def in_child(work: Callable[[], dict[str, int]]) -> tuple[str, dict[str, int]]:
    """What is wrong, "" for nothing, and what the work returned."""
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer: dict[str, object] = {}
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            answer["codes"] = work()
        except BaseException:
            answer["wrong"] = traceback.format_exc(limit=-8)
        try:
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if used > base + MEMORY:
                answer.setdefault("wrong", f"{used - base >> 10} MiB of memory")
            with os.fdopen(writer, "w") as pipe:
                json.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(writer)
    deadline, text, wrong = time.monotonic() + TIME_LIMIT, b"", ""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while True:
            if select.select([pipe], [], [], 0.1)[0]:
                data = pipe.read(1 << 16)
                if not data:
                    break
                text += data
            elif time.monotonic() > deadline or memory_of(pid) > KILLED_AT:
                wrong = "it hangs" if time.monotonic() > deadline else "it takes all memory"
                os.kill(pid, signal.SIGKILL)
                break
    _, status = os.waitpid(pid, 0)
    if wrong or not text:
        return wrong or f"the child ended with {status}", {}
    answer = json.loads(text)
    return str(answer.get("wrong", "")), answer.get("codes", {})  # type: ignore[return-value]


def memory_of(pid: int) -> int:
    """KiB."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    return 0


def outcomes(
    directory: Path, first: int, count: int
) -> Iterator[tuple[int, str, str, str, dict[str, int]]]:
    """Seed, kind of file, mutation, what is wrong, exit codes."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = bases(directory)
        base = found["sealed"]  # everything is imported before the first fork
        for name, data in base.files.items():
            (directory / name).write_bytes(data)
        run_verbs(directory, base, [*VERBS])
    kinds = list(found)
    gc.freeze()  # or each child's collections of garbage copy the pages of all objects
    for seed in range(first, first + count):
        rng = random.Random(seed)
        kind = kinds[seed % len(kinds)]
        base = found[kind]
        damaged = bytearray(base.files[base.damaged])
        mutation = mutate(damaged, base.anatomy, rng)
        names = rng.sample([*VERBS], VERBS_A_FILE)
        work = directory / "work"
        work.mkdir()
        for name, data in base.files.items():
            (work / name).write_bytes(damaged if name == base.damaged else data)
            os.utime(work / name, ns=TIMES)
        wrong, codes = in_child(lambda: run_verbs(work, base, names))  # noqa: B023
        shutil.rmtree(work)
        yield seed, kind, mutation, wrong, codes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path, help="an empty one, in memory")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    codes: Counter[str] = Counter()
    for seed, kind, mutation, wrong, ended in outcomes(
        options.directory, options.first, options.count
    ):
        codes.update(f"{kind}: {code}" for code in ended.values())
        if wrong:
            print(json.dumps([seed, kind, mutation, wrong]), flush=True)
    print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
