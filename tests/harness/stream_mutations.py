"""Damages a snapshot in seeded ways and sees what the package makes of it.

Each mutation is opened, verified, looked into, loaded, converted and sealed in a child of its own,
with a time limit and a bounded address space; a child that is killed, hangs, takes more than a
second of the processor or more than 256 MiB, or meets an exception that is not one of the package's
is a finding. To look into one by hand::

    python -m tests.harness.stream_mutations FILE --first SEED --count 1 --show

Run as a program, it is one process without threads, so that forking is safe; a result is one
line of JSON a mutation.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pyqmigrate import (
    Descriptors,
    FileMemory,
    NotSupported,
    SnapshotError,
    UsageError,
    seal,
    verify_seal,
)
from pyqmigrate.enums import Format
from pyqmigrate.export.convert import convert
from pyqmigrate.export.raw import unpack
from pyqmigrate.format.stream.wire import SectionKind
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.devices import devices
from pyqmigrate.snapshot.provenance import provenance
from pyqmigrate.snapshot.sequential import SequentialSnapshot

__all__ = ["Outcome", "run"]

T = TypeVar("T")

TIME_LIMIT = 20.0  # seconds for one mutation; one takes milliseconds
ADDRESS_SPACE = 2 << 30
CPU_LIMIT = 1.0  # seconds of the processor for one call
MEMORY_LIMIT = 256 << 10  # KiB over what the child had from the start
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a seal is synced to the disk
IN_MEMORY = 64 << 20  # bytes; blocks longer than this are loaded into files
LOADABLE = CONVERTIBLE = 4 << 40  # of what can be sparse
STREAMABLE = 512 << 20  # a sequential stream has a record for each page, be it zero
DIGESTED = 256 << 20
ALLOWED = (SnapshotError, NotSupported, UsageError)
ACCEPTED, REFUSED, BROKEN, SLOW = range(4)
VERDICTS = {ACCEPTED: "accepted", REFUSED: "refused", BROKEN: "broken", SLOW: "slow"}


@dataclass(frozen=True)
class Outcome:
    """What became of one mutation; ``verdict`` is accepted, refused, broken, killed,
    hung, slow or large."""

    seed: int
    mutation: str
    verdict: str
    detail: str


def run(file: Path, first: int, count: int, offset: int = 0) -> list[Outcome]:
    """Tries ``count`` mutations of ``file`` in a clean process of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.harness.stream_mutations",
        str(file),
        f"--first={first}",
        f"--count={count}",
        f"--offset={offset}",
    ]
    root = Path(__file__).parents[2]
    output = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True, text=True).stdout
    return [Outcome(**json.loads(line)) for line in output.splitlines()]


@dataclass(frozen=True)
class Anatomy:
    """Where a whole snapshot has its numbers: ``fields`` as (position, width in bytes)."""

    fields: list[tuple[int, int]]
    metadata: list[tuple[int, int]]  # [start, end) of what is not pages
    numbers: list[int]  # values that mean something in this file


# Magic, version, length of the XML, whether it ran, format, length of the cookie.
LIBVIRT_FIELDS = [(0, 16), *((at, 4) for at in (16, 20, 24, 28, 32))]


def dissect(data: bytes, file: Path, offset: int) -> Anatomy:
    with open_snapshot(file, offset=offset or None) as opened:
        if isinstance(opened, SequentialSnapshot):
            return _dissect_sequential(data, opened)
        offset, stream = opened.offset, opened.stream
        libvirt = opened.libvirt is not None
        increment = opened.format is Format.INCREMENT
        sections = [section for section in stream.sections if section.name != "ram"]
        blocks = sorted(
            (layout.pages_offset, layout.length, layout.name)
            for layout in opened.layouts
            if not layout.external
        )
    fields = [(offset, 4), (offset + 4, 4), (offset + 8, 1), (offset + 9, 4)]
    metadata, numbers, end = [], [len(data)], offset
    if libvirt:
        fields += LIBVIRT_FIELDS
        metadata.append((0, offset))
    if increment:
        fields += [(8, 4), (12, 4), (16, 8), (24, 8)]
    for section in sections:
        fields += [(section.offset, 1), (section.offset + 1, 4)]
        if section.kind is not SectionKind.FULL:  # its body has numbers of its own
            fields += [(section.body_offset + n, 1) for n in range(min(section.body_length, 8))]
    for pages_offset, length, name in blocks:
        metadata.append((end, pages_offset))
        text = bytes([len(name)]) + name.encode()
        at = data.index(text, end, pages_offset)
        fields.append((at, 1))
        at += len(text)
        fields += [(at, 8), (at + 8, 4), (at + 12, 8), (at + 20, 8), (at + 28, 8)]
        fields += [(at + 36 + 8 * i, 8) for i in range(2)]  # the bitmap's first words
        end = pages_offset + length
        numbers += [pages_offset, length, end]
    fields += [(data.index(b"ram\0\0\0\0\0\0\0\x04", offset) + 11, 8)]  # the sum of all lengths
    fields += [(end, 8), (end + 8, 1), (end + 9, 4), (end + 13, 1), (end + 14, 4), (end + 18, 8)]
    metadata.append((end, len(data)))
    return Anatomy(fields, metadata, numbers)


def _dissect_sequential(data: bytes, snapshot: SequentialSnapshot) -> Anatomy:
    """Besides the head and the tail, some of the records stand for all of them."""
    offset, stream = snapshot.offset, snapshot.stream
    fields = [(offset, 4), (offset + 4, 4), (offset + 8, 1), (offset + 9, 4)]
    fields += LIBVIRT_FIELDS if snapshot.libvirt else []
    numbers = [len(data), stream.total_ram]
    for block in stream.blocks:
        name = 1 + len(block.name.encode())
        fields += [(block.entry_offset, 1), (block.entry_offset + name, 8)]
        numbers += [block.length, block.entry_offset]
    metadata = []
    ram = [s for s in stream.sections if s.name == "ram"]
    for section in ram:
        fields += [(section.offset, 1), (section.offset + 1, 4), (section.body_offset, 8)]
        numbers.append(section.offset)
        # The first records of a section stand close together: zero pages.
        metadata.append((section.offset, min(section.offset + 4096, len(data))))
    for _, index in snapshot.blocks.items():
        for first, _, held in index.runs():
            if held and len(fields) < 400:
                word = data.find(snapshot_word(first, index.page_size), ram[0].offset)
                fields += [(word, 8)] if word > 0 else []
    for section in stream.sections:
        if section.kind is SectionKind.FULL:
            fields += [(section.offset, 1), (section.offset + 1, 4), (section.offset + 5, 1)]
    metadata += [(0, ram[0].offset + ram[0].length), (ram[-1].offset, len(data))]
    return Anatomy(fields, metadata, numbers)


def snapshot_word(page: int, page_size: int) -> bytes:
    """The word of a record that continues in a block and has a whole page."""
    return (page * page_size | 0x28).to_bytes(8, "big")


def mutate(data: bytearray, anatomy: Anatomy, rng: random.Random) -> str:
    """Damages ``data`` in one to three ways; says how."""
    how = [_mutate_once(data, anatomy, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    return ", ".join(how)


def _mutate_once(data: bytearray, anatomy: Anatomy, rng: random.Random) -> str:
    kind = rng.choices(
        ("field", "flip", "number", "cut", "insert", "remove", "copy"), (8, 4, 3, 2, 2, 2, 2)
    )[0]
    if kind == "field":
        at, width = rng.choice(anatomy.fields)
        return _overwrite(data, at, width, anatomy, rng)
    at = _position(data, anatomy, rng)
    length = min(rng.choice((1, 2, 4, 8, 17, 47, 512, 4096, 1 << 20)), max(len(data) - at, 1))
    if kind == "number":
        return _overwrite(data, at, rng.choice((1, 2, 4, 8)), anatomy, rng)
    if kind == "flip":
        bit = rng.randrange(8)
        if at < len(data):
            data[at] ^= 1 << bit
        return f"flip bit {bit} at {at:#x}"
    if kind == "cut":
        del data[at:]
        return f"cut at {at:#x}"
    if kind == "insert":
        data[at:at] = rng.choice((bytes(length), rng.randbytes(length)))
        return f"insert {length} bytes at {at:#x}"
    if kind == "remove":
        del data[at : at + length]
        return f"remove {length} bytes at {at:#x}"
    source = _position(data, anatomy, rng)
    data[at : at + length] = data[source : source + length]
    return f"copy {length} bytes from {source:#x} over {at:#x}"


def _overwrite(data: bytearray, at: int, width: int, anatomy: Anatomy, rng: random.Random) -> str:
    limit = 1 << 8 * width
    old = int.from_bytes(data[at : at + width], "big")
    number = (
        rng.choice(
            (
                0,
                1,
                2,
                511,
                512,
                1024,
                4095,
                4096,
                8192,
                65536,
                1 << 20,
                1 << 30,
                1 << 31,
                1 << 40,
                1 << 52,
                1 << 62,
                limit // 2,
                limit - 1,
                limit - 4096,
                rng.randrange(limit),
                old + 1,
                old - 1,
                old + 4096,
                old - 4096,
                old * 2,
                old ^ 1 << rng.randrange(8 * width),
                rng.choice(anatomy.numbers),
                rng.choice(anatomy.numbers) - 4096,
            )
        )
        % limit
    )
    data[at : at + width] = number.to_bytes(width, "big")
    return f"{width}-byte number at {at:#x}: {old:#x} -> {number:#x}"


def _position(data: bytearray, anatomy: Anatomy, rng: random.Random) -> int:
    """Mostly in the metadata, and there mostly near its ends, where it is dense."""
    start, end = rng.choice(anatomy.metadata) if rng.random() < 0.9 else (0, len(data))
    near = rng.choice((64, 256, 4096, end - start))
    near = max(min(near, end - start), 1)
    at = start + rng.randrange(near) if rng.random() < 0.7 else end - 1 - rng.randrange(near)
    return max(0, min(at, len(data)))


class Slow(Exception):
    """A call took longer than it may."""


def timed(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What ``call`` returns; Slow, whatever else it raises, when it took too long."""
    started = time.process_time()
    try:
        return call(*arguments, **options)
    finally:
        seconds = time.process_time() - started
        if seconds > CPU_LIMIT:
            raise Slow(f"{call.__name__}: {seconds:.2f} s of the processor")


def examine(file: Path, offset: int) -> tuple[int, str]:
    """Opens, verifies, looks into, loads and converts a file; says what came of it."""
    try:
        timed(devices, file, offset=offset or None)
        looked = None
    except ALLOWED as error:
        looked = f"devices: {error}"
    try:
        snapshot = timed(open_snapshot, file, offset=offset or None)
    except ALLOWED as error:
        return REFUSED, f"open: {error}"
    with snapshot:
        try:
            timed(snapshot.verify)
            flaw = None
        except ALLOWED as error:
            flaw = f"verify: {error}"
        if flaw is None and looked is not None:
            return BROKEN, f"verify found nothing, but {looked}"
        try:
            loadable = timed(provenance, snapshot).loadable
        except ALLOWED:  # of a sequential stream that cannot be read through
            loadable = False
        if loadable != (flaw is None):
            return BROKEN, f"verify found {flaw}, but info says loadable: {loadable}"
        try:
            timed(_load, snapshot)
        except ALLOWED as error:
            if flaw is None:
                return BROKEN, f"verify found nothing, but load: {error}"
        try:
            timed(_unpack, snapshot, file.parent / "raw")
        except ALLOWED as error:
            if flaw is None:
                return BROKEN, f"verify found nothing, but unpack: {error}"
        for form in ("other", "elf", "lime"):
            try:
                timed(_convert, snapshot, form)
            except NotSupported:
                pass
            except ALLOWED as error:
                # Physical memory cannot be had of every snapshot that is sound.
                if flaw is None and (form == "other" or isinstance(error, SnapshotError)):
                    return BROKEN, f"verify found nothing, but convert to {form}: {error}"
    with tempfile.TemporaryDirectory(dir=FAST) as scratch:
        copy = Path(scratch) / file.name
        shutil.copyfile(file, copy)
        broken = _seal(copy, offset, flaw)
    if broken is not None:
        return BROKEN, broken
    return (REFUSED, flaw) if flaw else (ACCEPTED, "")


def _seal(file: Path, offset: int, flaw: str | None) -> str | None:
    """Seals the file, which it may change, and holds it against the seal; what is wrong with that.

    What is no whole snapshot is neither sealed nor changed; of what is one, no page may differ.
    """
    before, was = file.read_bytes(), _digest(file, offset)
    try:
        try:
            report = timed(seal, file, offset=offset, channels=2)
        except UsageError as error:
            # Damaged bits may look more like those of a big-endian host.
            if "--bitmap-order" not in str(error) or file.read_bytes() != before:
                raise
            report = timed(seal, file, offset=offset, channels=2, bitmap_order="little")
    except ALLOWED as error:
        if flaw is None and not isinstance(error, NotSupported):
            return f"verify found nothing, but seal: {error}"
        if file.read_bytes() != before or file.with_name(f"{file.name}.seal").exists():
            return f"seal refused, and left something: {error}"
        return None
    if flaw is not None:
        return f"sealed, in spite of {flaw}"
    if not report.cleared_pages and file.read_bytes() != before:
        return "seal changed a file in which it had nothing to clear"
    if _digest(file, offset) != was:
        return "sealing changed the guest's memory"
    check = timed(verify_seal, file, channels=2)
    if check is None or not check.intact:
        return f"not intact once sealed: {check}"
    with file.open("r+b") as damaged:
        damaged.seek(len(before) // 2)
        byte = damaged.read(1)
        damaged.seek(len(before) // 2)
        damaged.write(bytes([byte[0] ^ 1]))
    check = timed(verify_seal, file, channels=2)
    if check is None or len(check.damages) != 1:
        return f"a flipped bit was not found: {check}"
    return None


def _digest(file: Path, offset: int) -> str | None:
    """Of the memory of the guest; None where it is too much, or cannot be had."""
    try:
        with open_snapshot(file, offset=offset) as snapshot:
            blocks = snapshot.blocks.values()
            if sum(block.length for block in blocks) > DIGESTED:
                return None
            state = hashlib.sha256()
            for block in blocks:
                for at in range(0, 0 if block.external else block.length, 1 << 20):
                    state.update(block.read(at, min(1 << 20, block.length - at)))
            return state.hexdigest()
    except ALLOWED:
        return None


def _load(snapshot: Snapshot) -> None:
    blocks = [block for block in snapshot.blocks.values() if not block.external]
    if length_of(snapshot) > LOADABLE:
        for block in blocks:
            block.read(0, 1)
            block.read(block.length - block.page_size, block.page_size)
        return
    with contextlib.ExitStack() as stack:
        memories: dict[str, bytearray | FileMemory] = {}
        for block in blocks:
            if block.length <= IN_MEMORY:
                memories[block.name] = bytearray(block.length)
                continue
            fd = os.memfd_create("loaded")
            stack.callback(os.close, fd)
            os.ftruncate(fd, block.length)
            memories[block.name] = FileMemory(fd)
        snapshot.load(memories, channels=2)


def length_of(snapshot: Snapshot) -> int:
    return sum(block.length for block in snapshot.blocks.values())


def _unpack(snapshot: Snapshot, directory: Path) -> None:
    if length_of(snapshot) > CONVERTIBLE:
        return
    try:
        unpack(snapshot, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _convert(snapshot: Snapshot, form: str) -> None:
    if form == "other":
        form = "stream" if snapshot.format is Format.MAPPED_RAM else "mapped-ram"
    if length_of(snapshot) > (STREAMABLE if form == "stream" else CONVERTIBLE):
        return
    target = os.memfd_create("converted")
    try:
        convert(snapshot, Descriptors(target), to=form)
        if form not in ("elf", "lime"):
            with open_snapshot(Descriptors(target)) as converted:
                converted.verify()
    finally:
        os.close(target)


def _examine_in_child(file: Path, offset: int) -> tuple[str, str]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        verdict, text = BROKEN, ""
        try:
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            verdict, text = examine(file, offset)
        except Slow as error:
            verdict, text = SLOW, str(error)
        except BaseException:
            text = traceback.format_exc(limit=-6)
        try:
            os.write(writer, text.encode(errors="replace")[:32768])
        finally:
            os._exit(verdict)
    os.close(writer)
    deadline = time.monotonic() + TIME_LIMIT
    detail = b""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while (left := deadline - time.monotonic()) > 0:
            if select.select([pipe], [], [], left)[0]:
                data = pipe.read(65536)
                if not data:
                    break
                detail += data
    hung = time.monotonic() >= deadline
    if hung:
        os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    text = detail.decode(errors="replace")
    if hung:
        return "hung", text
    if code < 0:
        return "killed", f"{signal.Signals(-code).name} {text}"
    if used.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + MEMORY_LIMIT:
        return "large", f"{used.ru_maxrss >> 10} MiB {text}"
    return VERDICTS.get(code, "broken"), text


def outcomes(file: Path, offset: int, first: int, count: int) -> Iterator[Outcome]:
    base = file.read_bytes()
    anatomy = dissect(base, file, offset)
    gc.freeze()  # or each child's collections of garbage copy the pages of all objects
    # Not on the disk: hundreds of conversions would be waited for.
    with tempfile.TemporaryDirectory(prefix="mutations-", dir="/dev/shm") as scratch:
        damaged = Path(scratch) / "damaged.mapped"
        for seed in range(first, first + count):
            data = bytearray(base)
            mutation = mutate(data, anatomy, random.Random(seed))
            damaged.write_bytes(data)
            yield Outcome(seed, mutation, *_examine_in_child(damaged, offset))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="in plain words instead of JSON")
    options = parser.parse_args()
    for outcome in outcomes(options.file, options.offset, options.first, options.count):
        text = "{seed}: {mutation}\n    {verdict} {detail}" if options.show else None
        print(text.format(**asdict(outcome)) if text else json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
