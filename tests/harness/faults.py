"""Every verb with a system call that fails, at a place that a seed chooses.

Run as a program, under the shim of ``faults.c``; prints a line of JSON for each run that went
wrong, and how often each fault was met::

    LD_PRELOAD=faults.so python -m tests.harness.faults DIRECTORY --first 0 --count 100

A run does one piece of work twice over: once to count the calls on files of its directory, then
with a fault in one of them. Afterwards the directory holds what it held before, or the result, and
that whole; no descriptor or thread is left; and an error is the right one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import gc
import io
import json
import os
import random
import shutil
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from pyqmigrate import (
    FileMemory,
    GuestMemoryError,
    NoSpace,
    NotDurable,
    NotSupported,
    PyqmigrateError,
    RamBlock,
    SnapshotError,
    TargetError,
    compact,
    diff,
    open_snapshot,
    save,
    seal,
    verify_seal,
)
from pyqmigrate.cli import main as command
from pyqmigrate.errors import target_error
from pyqmigrate.export.convert import convert
from pyqmigrate.export.raw import unpack
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.seekable_file import SeekableFile
from pyqmigrate.migration import Migration
from pyqmigrate.page_server.sources import open_source
from pyqmigrate.qapi.event import Event
from pyqmigrate.qapi.status import Status
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from pyqmigrate.store import Store, add, get, verify
from tests.harness.increment_files import save_base, save_increment
from tests.harness.snapshots import Bytes, ram

__all__ = ["WORK", "run"]

SHORT, END = 10000, 10001
KINDS = ("write", "read", "sync", "link", "size", "punch", "open", "setup", "submit", "event")
FULL = (errno.ENOSPC, errno.EDQUOT)
# What is no failure: the call is made again, or another way is gone.
HARMLESS = {SHORT, errno.EINTR}
QUEUE = {"setup", "submit", "event"}
OLD, NEW = ram(300, seed=1), ram(700, seed=2)
BLOCKS = [RamBlock("pc.ram", NEW), RamBlock("small", OLD)]
OTHER = ram(300, seed=3)
DIFFERING = int((OLD.reshape(-1, 4096) != OTHER.reshape(-1, 4096)).any(axis=1).sum())


class Shim:
    """The preloaded library."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)

    def arm(self, where: Path, at: int, choice: int, *, lasting: bool, unnamed: bool) -> None:
        self.library.faults_arm(
            os.fsencode(where), ctypes.c_long(at), choice, int(lasting), int(unnamed)
        )

    def disarm(self) -> int:
        self.library.faults_disarm.restype = ctypes.c_long
        return int(self.library.faults_disarm())

    def fired(self) -> tuple[str, int] | None:
        """Kind of call, and fault."""
        kind, number = ctypes.c_int(), ctypes.c_int()
        self.library.faults_fired.restype = ctypes.c_long
        if not self.library.faults_fired(ctypes.byref(kind), ctypes.byref(number)):
            return None
        return KINDS[kind.value], number.value


@dataclass(frozen=True)
class Work:
    """One piece of work, in a directory that ``prepare`` has filled; ``check`` looks at the result
    of a run that succeeded (True) or not."""

    prepare: Callable[[Path], None]
    do: Callable[[Path, random.Random], None]
    check: Callable[[Path, bool], None]


# ---- what is there before ----


def nothing(directory: Path) -> None:
    """An empty directory."""


def an_old_one(directory: Path) -> None:
    save(directory / "new", [RamBlock("old", OLD)])


def a_sealed_old_one(directory: Path) -> None:
    save(directory / "new", [RamBlock("old", OLD)], seal="xxh3-128")


def a_mapped_one(directory: Path) -> None:
    save(directory / "from", BLOCKS, machine="pc-q35-10.0")


def one_with_stale_pages(directory: Path) -> None:
    a_mapped_one(directory)
    with open_snapshot(directory / "from") as snapshot, (directory / "from").open("r+b") as file:
        block = snapshot.blocks["pc.ram"]
        clear = np.flatnonzero(~NEW.reshape(-1, 4096).any(axis=1))[:20]
        for page in clear:
            file.seek(block.layout.pages_offset + int(page) * 4096)  # type: ignore[union-attr]
            file.write(b"old")


def a_sequential_one(directory: Path) -> None:
    start_sequential_save(directory / "from", BLOCKS, machine="pc-q35-10.0").wait()


def with_memory_files(prepare: Callable[[Path], None]) -> Callable[[Path], None]:
    def do(directory: Path) -> None:
        prepare(directory)
        for block in BLOCKS:
            path = directory / f"{block.name}.ram"
            path.write_bytes(b"\7" * len(block.memory))  # type: ignore[arg-type]

    return do


def two_of_them(directory: Path) -> None:
    a_mapped_one(directory)
    save(directory / "other", [RamBlock("pc.ram", NEW), RamBlock("small", OTHER)])


def a_base(directory: Path) -> None:
    memories = {block.name: np.full(len(block.memory), 5, np.uint8) for block in BLOCKS}  # type: ignore[arg-type]
    save_base(directory / "base", memories)


def a_base_and_an_old_one(directory: Path) -> None:
    a_base(directory)
    an_old_one(directory)


def an_increment(directory: Path) -> None:
    a_base(directory)
    save_step(directory / "from", directory, "off")


def an_empty_store(directory: Path) -> None:
    a_mapped_one(directory)
    Store.create(directory / "store").close()


def a_store(directory: Path) -> None:
    an_empty_store(directory)
    with Store.open(directory / "store") as store:
        add(store, directory / "from", "a")
    (directory / "from").unlink()


def an_increment_and_its_stored_base(directory: Path) -> None:
    an_increment(directory)
    with Store.create(directory / "store") as store:
        add(store, directory / "base", "base")


def raw_memory(directory: Path) -> None:
    (directory / "ram").write_bytes(NEW.tobytes())


# ---- what is done ----


def saved(**options: object) -> Callable[[Path, random.Random], None]:
    def do(directory: Path, rng: random.Random) -> None:
        settings = {
            "direct_io": rng.choice(("auto", "off")),
            "sparse": rng.choice(("auto", "exact")),
            "channels": rng.choice((1, 2)),
        } | options
        save(directory / "new", BLOCKS, **settings)  # type: ignore[arg-type]

    return do


def save_step(path: Path, directory: Path, direct_io: str) -> None:
    """An increment whose base has none of the pages of its first block."""
    memories = {block.name: block.memory for block in BLOCKS}
    changed = {BLOCKS[0].name: np.ones(len(NEW) // 4096, bool)}
    options = {"direct_io": DirectIO(direct_io)}
    save_increment(path, directory / "base", memories, changed, **options)


def saved_as_increment(directory: Path, rng: random.Random) -> None:
    save_step(directory / "new", directory, rng.choice(("auto", "off")))


def saved_at_an_offset(directory: Path, rng: random.Random) -> None:
    save(f"file:{directory}/new,offset={rng.choice((4096, 513))}", BLOCKS)


def saved_sequential(directory: Path, _: random.Random) -> None:
    start_sequential_save(directory / "new", BLOCKS).wait()


def saved_from_a_file(directory: Path, _: random.Random) -> None:
    with opened_by_the_caller(directory / "ram", "rb") as file:
        save(directory / "new", [RamBlock("pc.ram", FileMemory(file.fileno()))])


def opened_by_the_caller(path: Path, mode: str) -> IO[bytes]:
    """A file of memory; what cannot be opened is no fault of the package."""
    try:
        return path.open(mode)
    except OSError as error:
        raise target_error(error, "cannot open the memory") from error


def loaded(directory: Path, rng: random.Random) -> None:
    memories = {block.name: np.full(len(block.memory), 7, np.uint8) for block in BLOCKS}  # type: ignore[arg-type]
    with open_snapshot(directory / "from") as snapshot:
        snapshot.verify()
        snapshot.load(memories, direct_io="auto", channels=rng.choice((1, 3)))
    for block in BLOCKS:
        assert memories[block.name].tobytes() == block.memory.tobytes(), "loaded wrong"  # type: ignore[union-attr]


def loaded_into_files(directory: Path, _: random.Random) -> None:
    with contextlib.ExitStack() as stack:
        memories = {}
        for block in BLOCKS:
            path = directory / f"{block.name}.ram"
            file = stack.enter_context(opened_by_the_caller(path, "r+b"))
            memories[block.name] = FileMemory(file.fileno())
        with open_snapshot(directory / "from") as snapshot:
            snapshot.load(memories)


def sealed(directory: Path, _: random.Random) -> None:
    seal(directory / "from")


def converted(form: str) -> Callable[[Path, random.Random], None]:
    def do(directory: Path, rng: random.Random) -> None:
        convert(directory / "from", directory / "new", to=form, channels=rng.choice((1, 2)))

    return do


def unpacked(directory: Path, _: random.Random) -> None:
    with open_snapshot(directory / "from") as snapshot:
        unpack(snapshot, directory / "raw")


def migrated(directory: Path, _: random.Random) -> None:
    migration = Migration(BLOCKS)
    migration.set_capabilities({"mapped-ram": True})
    try:
        migration.migrate(f"file:{directory}/new")
        info = migration.wait(60)
    finally:
        migration.close()
    if info.status is not Status.COMPLETED:
        raise Failed(info.error)


def migrated_in(directory: Path, _: random.Random) -> None:
    memories = {block.name: np.full(len(block.memory), 7, np.uint8) for block in BLOCKS}  # type: ignore[arg-type]
    migration = Migration(
        [RamBlock(name, memory) for name, memory in memories.items()], incoming=True
    )
    migration.set_capabilities({"mapped-ram": True})
    ended = threading.Event()
    migration.subscribe(lambda event: ended.set() if at_end(event) else None)
    migration.set_capabilities({"events": True})
    try:
        migration.migrate_incoming(f"file:{directory}/from", exit_on_error=False)
        assert ended.wait(60)
        error = migration.query().error
    finally:
        migration.close()
    if error:
        raise Failed(error)
    for block in BLOCKS:
        assert memories[block.name].tobytes() == block.memory.tobytes(), "loaded wrong"  # type: ignore[union-attr]


def at_end(event: Event) -> bool:
    return event.name == "MIGRATION" and dict(event.data or {})["status"] in ("completed", "failed")


def indexed(directory: Path, _: random.Random) -> None:
    with open_snapshot(directory / "from", index=directory / "index") as snapshot:
        for block in BLOCKS:
            held = snapshot.blocks[block.name].read(0, len(block.memory))  # type: ignore[arg-type]
            assert held == block.memory.tobytes(), "read wrong"  # type: ignore[union-attr]


class Failed(Exception):
    """Work that told its failure by words; their reason is looked for."""


class Exited(Exception):
    """The command's exit code, and what it wrote to standard error."""


def compacted(directory: Path, rng: random.Random) -> None:
    compact(directory / "from", directory / "new", channels=rng.choice((1, 2)))


def compared(directory: Path, rng: random.Random) -> None:
    report = diff(directory / "from", directory / "other", channels=rng.choice((1, 2)), pages=True)
    assert report.differing_pages == DIFFERING, "compared wrong"


def told(*words: str) -> Callable[[Path, random.Random], None]:
    """The command line."""

    def do(directory: Path, _: random.Random) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command([word.replace("DIR", str(directory)) for word in words])
        if code:
            raise Exited(code, err.getvalue() or out.getvalue())

    return do


def served_pages(directory: Path, _: random.Random) -> None:
    """All pages that a page server would send."""
    with open_source(directory / "from") as source:
        for number, spec in enumerate(source.state.blocks):
            source.read(number, 0, spec.length // spec.page_size)


# ---- what is there afterwards ----


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def holds(path: Path, blocks: dict[str, Bytes], offset: int | None = None) -> bool:
    """Whether a whole snapshot with these blocks is there; False for none at all."""
    try:
        with open_snapshot(path, offset=offset) as snapshot:
            snapshot.verify()
            return {
                name: block.read(0, block.length) for name, block in snapshot.blocks.items()
            } == {name: memory.tobytes() for name, memory in blocks.items()}
    except (SnapshotError, NotSupported):
        return False


NEW_BLOCKS = {"pc.ram": NEW, "small": OLD}


def new_or(*before: str, memory: dict[str, Bytes] = NEW_BLOCKS) -> Callable[[Path, bool], None]:
    """The new snapshot whole (and its seal, if any, right), or what was there before."""

    def check(directory: Path, done: bool) -> None:
        there = names(directory)
        assert there - {"new", "new.seal"} <= set(before), f"left behind: {there}"
        whole = (directory / "new").exists() and holds(directory / "new", memory)
        old = (directory / "new").exists() and holds(directory / "new", {"old": OLD})
        assert whole if done else whole or old or "new" not in there | set(before), there
        if (directory / "new.seal").exists():
            found = verify_seal(directory / "new")
            assert found is not None
            assert found.intact, "the seal is of another file"

    return check


def in_place(offset: int | None) -> Callable[[Path, bool], None]:
    """Whole, or recognisably not a snapshot; or what was there, where nothing was changed yet."""

    def check(directory: Path, done: bool) -> None:
        assert names(directory) <= {"new"}
        path = directory / "new"
        if not path.exists():
            assert not done
            return
        whole = any(
            holds(path, NEW_BLOCKS, at) for at in ((None,) if offset is None else (4096, 513))
        )
        assert whole or not done
        whole = whole or holds(path, {"old": OLD})
        for at in (0, 4096, 513):
            if whole:
                return
            with path.open("rb") as file:
                file.seek(at)
                assert file.read(4) != b"QEVM", "a part passes for a snapshot"

    return check


def unchanged(directory: Path, done: bool) -> None:
    assert names(directory) <= {"from", "from.seal", "index"}, names(directory)
    assert holds(directory / "from", NEW_BLOCKS)
    if (directory / "from.seal").exists():
        found = verify_seal(directory / "from")
        assert found is not None
        assert found.intact


def with_base(check: Callable[[Path, bool], None]) -> Callable[[Path, bool], None]:
    """The check, and the base as it was; without it the check could read no increment."""

    def with_it(directory: Path, done: bool) -> None:
        with open_snapshot(directory / "base") as snapshot:
            snapshot.verify()
            for block in snapshot.blocks.values():
                assert block.read(0, block.length) == b"\5" * block.length
        check(directory, done)

    return with_it


def unchanged_increment(directory: Path, done: bool) -> None:
    assert names(directory) <= {"base", "from", "from.seal"}, names(directory)
    assert holds(directory / "from", NEW_BLOCKS)


def in_files(directory: Path, done: bool) -> None:
    for block in BLOCKS:
        path = directory / f"{block.name}.ram"
        assert not done or path.read_bytes() == block.memory.tobytes()  # type: ignore[union-attr]
        path.unlink()
    unchanged(directory, done)


def unchanged_pair(directory: Path, done: bool) -> None:
    (directory / "other").unlink()
    unchanged(directory, done)


def compact_whole(directory: Path, done: bool) -> None:
    """The compact file whole, or none."""
    assert names(directory) <= {"from", "new"}, names(directory)
    assert done <= (directory / "new").exists()
    if (directory / "new").exists():
        with contextlib.closing(SeekableFile(directory / "new")) as file:
            (directory / "plain").write_bytes(file.read(0, file.size))
        assert holds(directory / "plain", NEW_BLOCKS)


def with_a_page(directory: Path, done: bool) -> None:
    """The page whole, or none."""
    page = directory / "page"
    assert not done or page.exists()
    if page.exists():
        assert page.read_text().rstrip().endswith("</html>")
        page.unlink()
    unchanged(directory, done)


def core(directory: Path, done: bool) -> None:
    assert names(directory) <= {"from", "new"}, names(directory)
    assert not done or (directory / "new").read_bytes()[:4] == b"\x7fELF"


def raw_files(directory: Path, done: bool) -> None:
    """All of them under their names, or none."""
    assert names(directory) <= {"from", "raw"}, names(directory)
    there = names(directory / "raw") if (directory / "raw").exists() else set()
    if "blocks.json" in there or done:
        listed = json.loads((directory / "raw" / "blocks.json").read_text())["blocks"]
        for block in listed:
            memory = NEW_BLOCKS[block["name"]].tobytes()
            assert (directory / "raw" / block["file"]).read_bytes() == memory
    assert not any(name.endswith(".partial") for name in there), there


def in_store(name: str, *before: str, snapshot: str = "a") -> Callable[[Path, bool], None]:
    """The store is intact, and has the snapshot whole, or not at all."""

    def check(directory: Path, done: bool) -> None:
        assert names(directory) <= {*before, name}, names(directory)
        if not (directory / name / "store.json").exists():
            assert not done
            return
        with Store.open(directory / name) as store:
            assert verify(store).intact
            assert store.names() == [snapshot] or not done
            if store.names():
                get(store, snapshot, directory / "got")
                assert holds(directory / "got", NEW_BLOCKS)
        hidden = [path.name for path in (directory / name).rglob(".*")]
        assert not hidden, f"left behind: {hidden}"

    return check


def in_store_with_its_base(directory: Path, done: bool) -> None:
    """The same for an increment whose base is in the store."""
    with Store.open(directory / "store") as store:
        assert verify(store).intact
        assert store.names() in (["a", "base"], ["base"])
        assert "a" in store.names() or not done
        if "a" in store.names():
            get(store, "a", directory / "got")
            assert holds(directory / "got", NEW_BLOCKS)


def removed_from_store(directory: Path, done: bool) -> None:
    """The store is intact, without the snapshot, or with all of it."""
    with Store.open(directory / "store") as store:
        assert verify(store).intact
        assert store.names() in ([], ["a"])
        assert not done or not store.names()


def a_new_store(directory: Path, done: bool) -> None:
    """An empty store, or none."""
    assert names(directory) <= {"from", "store"}, names(directory)
    if done or (directory / "store" / "store.json").exists():
        with Store.open(directory / "store") as store:
            assert store.names() == []


WORK: dict[str, Work] = {
    "save": Work(nothing, saved(), new_or()),
    "save over": Work(an_old_one, saved(), new_or("new")),
    "save over a sealed one": Work(a_sealed_old_one, saved(), new_or("new")),
    "save with a seal": Work(nothing, saved(seal="xxh3-128"), new_or()),
    "save in place": Work(an_old_one, saved(reuse=True), in_place(None)),
    "save at an offset": Work(nothing, saved_at_an_offset, in_place(1)),
    "save sequential": Work(nothing, saved_sequential, new_or()),
    "save from a file": Work(raw_memory, saved_from_a_file, new_or("ram", memory={"pc.ram": NEW})),
    "load": Work(a_mapped_one, loaded, unchanged),
    "load into files": Work(with_memory_files(a_mapped_one), loaded_into_files, in_files),
    "increment": Work(a_base, saved_as_increment, with_base(new_or("base"))),
    "increment over": Work(
        a_base_and_an_old_one, saved_as_increment, with_base(new_or("base", "new"))
    ),
    "load increment": Work(an_increment, loaded, with_base(unchanged_increment)),
    "seal increment": Work(an_increment, sealed, with_base(unchanged_increment)),
    "flatten": Work(an_increment, converted("mapped-ram"), with_base(new_or("from", "base"))),
    "load sequential": Work(a_sequential_one, loaded, unchanged),
    "load sequential into files": Work(
        with_memory_files(a_sequential_one), loaded_into_files, in_files
    ),
    "index": Work(a_sequential_one, indexed, unchanged),
    "seal": Work(a_mapped_one, sealed, unchanged),
    "seal and clear": Work(one_with_stale_pages, sealed, unchanged),
    "to stream": Work(a_mapped_one, converted("stream"), new_or("from")),
    "to mapped-ram": Work(a_sequential_one, converted("mapped-ram"), new_or("from")),
    "to elf": Work(
        a_mapped_one,
        told("convert", "DIR/from", "DIR/new", "--to", "elf", "--map", "pc.ram@0+0,2867200"),
        core,
    ),
    "compact": Work(a_mapped_one, compacted, compact_whole),
    "compact sequential": Work(a_sequential_one, compacted, compact_whole),
    "diff": Work(two_of_them, compared, unchanged_pair),
    "unpack": Work(a_mapped_one, unpacked, raw_files),
    "unpack sequential": Work(a_sequential_one, unpacked, raw_files),
    "migrate": Work(nothing, migrated, new_or()),
    "migrate in": Work(a_mapped_one, migrated_in, unchanged),
    "the command pack": Work(
        raw_memory,
        told("pack", "DIR/new", "pc.ram=DIR/ram", "--seal=sha256"),
        new_or("ram", memory={"pc.ram": NEW}),
    ),
    "the command convert": Work(
        a_mapped_one, told("convert", "DIR/from", "DIR/new", "--to", "stream"), new_or("from")
    ),
    "the command unpack": Work(a_mapped_one, told("unpack", "DIR/from", "DIR/raw"), raw_files),
    "the command seal": Work(a_mapped_one, told("seal", "DIR/from"), unchanged),
    "the command verify": Work(a_mapped_one, told("verify", "DIR/from"), unchanged),
    "the pages of a page server": Work(a_mapped_one, served_pages, unchanged),
    "the command find": Work(
        a_mapped_one, told("find", "DIR/from", "no such text in it"), unchanged
    ),
    "the command strings": Work(
        a_sequential_one, told("strings", "DIR/from", "-n", "90"), unchanged
    ),
    "the command read": Work(a_mapped_one, told("read", "DIR/from", "small:0", "4096"), unchanged),
    "the command info": Work(a_sequential_one, told("info", "DIR/from"), unchanged),
    "the command map": Work(a_mapped_one, told("map", "DIR/from"), unchanged),
    "the command map --html": Work(
        a_mapped_one, told("map", "DIR/from", "--html", "DIR/page"), with_a_page
    ),
    "the command fleet verify": Work(
        a_mapped_one, told("fleet", "verify", "DIR/from", "--jobs", "1"), unchanged
    ),
    "the command fleet seal": Work(
        a_mapped_one, told("fleet", "seal", "DIR/from", "--jobs", "1"), unchanged
    ),
    "the command fleet info": Work(
        a_mapped_one, told("fleet", "info", "DIR/from", "--jobs", "1"), unchanged
    ),
    "the command fleet add": Work(
        an_empty_store,
        told("fleet", "add", "DIR/from", "--store", "DIR/store", "--jobs", "1"),
        in_store("store", "from", snapshot="from"),
    ),
    "the command store create": Work(
        a_mapped_one, told("store", "create", "DIR/store"), a_new_store
    ),
    "the command store add of an increment": Work(
        an_increment_and_its_stored_base,
        told("store", "add", "DIR/store", "DIR/from", "--name", "a"),
        in_store_with_its_base,
    ),
    "the command store list": Work(a_store, told("store", "list", "DIR/store"), in_store("store")),
    "the command store show": Work(
        a_store, told("store", "show", "DIR/store", "a"), in_store("store")
    ),
    "the command store verify": Work(
        a_store, told("store", "verify", "DIR/store"), in_store("store")
    ),
    "the command store rm": Work(
        a_store, told("store", "rm", "DIR/store", "a"), removed_from_store
    ),
    "the command store add": Work(
        an_empty_store,
        told("store", "add", "DIR/store", "DIR/from", "--name", "a"),
        in_store("store", "from"),
    ),
    "the command store get": Work(
        a_store, told("store", "get", "DIR/store", "a", "DIR/new"), new_or("store")
    ),
    "the command store copy": Work(
        a_store, told("store", "copy", "DIR/store", "DIR/other"), in_store("other", "store")
    ),
    "the command store gc": Work(a_store, told("store", "gc", "DIR/store"), in_store("store")),
}


# ---- a run ----

_LAST_STEPS = 2.0  # seconds that a thread may take to end after it has told of its end


def state() -> tuple[set[str], int]:
    """Open descriptors, and threads; the next collection then only examines newer objects."""
    gc.collect()
    gc.freeze()
    open_files = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            open_files.add(f"{entry.name} {entry.readlink()}")
    return {name for name in open_files if not name.endswith("/fd")}, threading.active_count()


def judge(error: BaseException | None, kind: str, number: int, lasting: bool) -> str | None:
    """What is wrong with how a run ended whose ``kind`` of call had the fault ``number``."""
    if error is None:
        return None  # another way was gone; what came of it is looked at
    if isinstance(error, AssertionError):
        return str(error)
    if number in HARMLESS or kind == "setup":
        return f"{describe(number)} of {kind} is no failure, but: {error!r}"
    if number == END:
        if isinstance(error, Failed):
            return None
        right = isinstance(error, SnapshotError | NotSupported | GuestMemoryError)
        right |= isinstance(error, Exited) and error.args[0] in (1, 3, 4, 5)
        return None if right else f"the end of the file: {error!r}"
    words = os.strerror(number)
    if isinstance(error, Failed):
        return None if words in str(error) else f"the reason is not {words!r}: {error}"
    if isinstance(error, Exited):
        code, text = error.args
        return None if code in (3, 4) and words in text else f"exit code {code}: {text}"
    if not isinstance(error, PyqmigrateError) or not isinstance(error, OSError):
        return f"an exception of another kind: {error!r}"
    if error.errno != number:
        return f"errno is {error.errno}, not {number}: {error!r}"
    full = isinstance(error, NoSpace | NotDurable) if number in FULL else isinstance(error, NoSpace)
    if isinstance(error, TargetError) and full != (number in FULL):
        return f"a full disk, or not: {error!r}"
    if words not in str(error) or str(error).count(words) > 1:
        return f"the reason should be told once: {error}"
    return None


def describe(number: int) -> str:
    return {SHORT: "a short transfer", END: "the end"}.get(number) or os.strerror(number)


def attempt(work: Work, directory: Path, seed: str) -> BaseException | None:
    try:
        work.do(directory, random.Random(seed))
    except Exception as error:
        return error
    return None


def run(name: str, seed: int, shim: Shim, places: list[Path]) -> tuple[str, str | None]:
    """Which fault was met, and what is wrong."""
    work, rng = WORK[name], random.Random(f"{name} {seed}")
    parent, options = rng.choice(places), f"{seed}"
    lasting, unnamed = rng.random() < 0.4, rng.random() < 0.7
    seen = 0
    for at in (-2, None):
        directory = parent / f"run-{seed}"
        directory.mkdir()
        try:
            work.prepare(directory)
            before = state()
            choice = rng.randrange(1 << 16)
            place = at if at is not None else rng.randrange(max(seen, 1))
            shim.arm(directory, place, choice, lasting=lasting, unnamed=unnamed)
            error = attempt(work, directory, options)
            seen = shim.disarm()
            met = shim.fired()
            wrong = None
            if met is None and error is not None:
                wrong = f"no fault, but {error!r}"
            elif met is not None:
                wrong = judge(error, *met, lasting)
            trace = "".join(traceback.format_exception(error)) if wrong and error else ""
            error = None
            if wrong is None:
                wrong = look(work, directory, met is None, before)
            told_fault = "none" if met is None else f"{met[0]}: {describe(met[1])}"
            if wrong is not None:
                return told_fault, f"{wrong} (call {place} of {seen})\n{trace}"
        finally:
            shutil.rmtree(directory)
    return told_fault, None


def look(work: Work, directory: Path, done: bool, before: tuple[set[str], int]) -> str | None:
    after, deadline = state(), time.monotonic() + _LAST_STEPS
    while after[1] > before[1] and time.monotonic() < deadline:
        time.sleep(0.01)
        after = state()
    if after != before:
        return f"left open: {after[0] - before[0]}, threads {after[1] - before[1]}"
    try:
        work.check(directory, done)
    except Exception as error:
        return "".join(traceback.format_exception(error))
    return None


def runs(first: int, count: int, places: list[Path]) -> Iterator[tuple[int, str, str, str | None]]:
    shim, kinds = Shim(), list(WORK)
    for seed in range(first, first + count):
        name = kinds[seed % len(kinds)]
        yield seed, name, *run(name, seed, shim, places)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("places", nargs="+", type=Path, help="directories to work in")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    met: Counter[str] = Counter()
    for seed, name, fault, wrong in runs(options.first, options.count, options.places):
        met[fault] += 1
        if wrong is not None:
            print(json.dumps([seed, name, fault, wrong]), flush=True)
    print(json.dumps(met), flush=True)


if __name__ == "__main__":
    main()
