"""Every verb that writes: what is in use is not written over, and only files of their kind are
replaced. In each case nothing at all is changed."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyqmigrate import FileMemory, RamBlock, UsageError, open_snapshot, seal
from pyqmigrate.migration import Migration
from pyqmigrate.qapi.address import parse_uri
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from tests.harness.command import Command, make_snapshot, pages

NAME = "pc.ram"
MACHINE = "pc-q35-10.0"


@dataclass(frozen=True)
class Setting:
    """Files that are in use, in a directory of their own."""

    directory: Path
    memory: Path
    snapshot: Path
    stream: Path

    def listing(self) -> dict[str, tuple[int, bytes]]:
        """Every file there: its type, and its content."""
        found = {}
        for path in sorted(self.directory.rglob("*")):
            mode = path.lstat().st_mode
            content = path.read_bytes() if stat.S_ISREG(mode) else b""
            found[str(path)] = stat.S_IFMT(mode), content
        return found


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    memory, snapshot, stream = (tmp_path / name for name in ("memory", "snapshot", "stream"))
    memory.write_bytes(pages(16, 1))
    make_snapshot(snapshot, {NAME: pages(16, 2)}, machine=MACHINE)
    start_sequential_save(stream, [RamBlock(NAME, pages(16, 3))], machine=MACHINE).wait()
    seal(snapshot)
    seal(stream)
    return Setting(tmp_path, memory, snapshot, stream)


# ---- what is in use ------------------------------------------------------------------------------


def same(path: Path) -> Path:
    return path


def symlink(path: Path) -> Path:
    (path.parent / "symlink").symlink_to(path.name)
    return path.parent / "symlink"


def hard_link(path: Path) -> Path:
    os.link(path, path.parent / "hard-link")
    return path.parent / "hard-link"


Arguments = Callable[[Setting, Callable[[Path], Path]], list[str | Path]]


def beside(target: Path, suffix: str, precious: Path) -> Path:
    """``target``, beside which a name that goes with it is that of the precious file."""
    os.link(precious, target.with_name(target.name + suffix))
    return target


def directory_with(setting: Setting, name: str, precious: Path) -> Path:
    out = setting.directory / "out"
    out.mkdir()
    os.link(precious, out / name)
    return out


WRITES: dict[str, Arguments] = {
    "pack": lambda s, named: ["pack", named(s.memory), f"{NAME}={s.memory}"],
    "pack --offset": lambda s, named: [
        "pack",
        named(s.memory),
        f"{NAME}={s.memory}",
        "--offset",
        "4k",
    ],
    "pack, the seal": lambda s, _: [
        "pack",
        beside(s.directory / "new", ".seal", s.memory),
        f"{NAME}={s.memory}",
    ],
    "pack --seal, the seal": lambda s, _: [
        "pack",
        beside(s.directory / "new", ".seal", s.memory),
        f"{NAME}={s.memory}",
        "--seal",
    ],
    **{
        f"convert {kind} --to {form}": lambda s, named, kind=kind, form=form: [  # type: ignore[misc]
            "convert",
            getattr(s, kind),
            named(getattr(s, kind)),
            "--to",
            form,
            *(["--map", f"{NAME}@0"] if form in ("elf", "lime") else []),
        ]
        for kind in ("snapshot", "stream")
        for form in ("mapped-ram", "stream", "elf", "lime")
    },
    **{
        f"convert {kind}, its seal, --to {form}": lambda s, named, kind=kind, form=form: [  # type: ignore[misc]
            "convert",
            getattr(s, kind),
            named(s.directory / f"{kind}.seal"),
            "--to",
            form,
            *(["--map", f"{NAME}@0"] if form in ("elf", "lime") else []),
        ]
        for kind in ("snapshot", "stream")
        for form in ("mapped-ram", "stream", "elf", "lime")
    },
    "convert, a memory": lambda s, named: [
        "convert",
        s.snapshot,
        named(s.memory),
        "--to",
        "stream",
        "--memory",
        f"{NAME}={s.memory}",
    ],
    "convert --to raw, a raw file": lambda s, _: [
        "convert",
        s.snapshot,
        directory_with(s, f"{NAME}.raw", s.snapshot),
        "--to",
        "raw",
    ],
    "unpack, a raw file": lambda s, _: [
        "unpack",
        s.snapshot,
        directory_with(s, f"{NAME}.raw", s.snapshot),
    ],
    "unpack, a raw file that is the seal": lambda s, _: [
        "unpack",
        s.snapshot,
        directory_with(s, f"{NAME}.raw", s.snapshot.with_name("snapshot.seal")),
    ],
    "unpack, the list": lambda s, _: [
        "unpack",
        s.stream,
        directory_with(s, "blocks.json", s.stream),
    ],
    "info --index": lambda s, named: ["info", s.stream, "--index", named(s.stream)],
    "verify --index": lambda s, named: ["verify", s.stream, "--index", named(s.stream)],
    "seal": lambda s, _: [
        "seal",
        beside(s.directory / "link", ".seal", s.snapshot).with_name("link"),
    ],
}


@pytest.mark.parametrize("named", [same, symlink, hard_link])
@pytest.mark.parametrize("verb", WRITES)
def test_a_file_in_use_is_not_touched(
    setting: Setting, command: Command, verb: str, named: Callable[[Path], Path]
) -> None:
    if verb == "seal":
        os.link(setting.snapshot, setting.directory / "link")
    arguments = WRITES[verb](setting, named)
    before = setting.listing()
    ran = command(*arguments)
    assert ran.code == 2, ran
    assert "in use" in ran.err or "would replace" in ran.err
    assert setting.listing() == before


@pytest.mark.parametrize("named", [same, symlink, hard_link])
@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("mapped_ram", [True, False])
@pytest.mark.parametrize("suffix", ["", ",offset=4096"])
def test_a_migration_does_not_write_over_its_memory(
    setting: Setting, named: Callable[[Path], Path], policy: Policy, mapped_ram: bool, suffix: str
) -> None:
    target = named(setting.memory)
    before = setting.listing()
    fd = os.open(setting.memory, os.O_RDWR)
    try:
        migration = Migration([RamBlock(NAME, FileMemory(fd))], policy=policy)
        migration.set_capabilities({"mapped-ram": mapped_ram})
        with pytest.raises(ValueError, match=f"the memory of block '{NAME}'"):
            migration.migrate(parse_uri(f"file:{target}{suffix}"))
        migration.close()
    finally:
        os.close(fd)
    assert setting.listing() == before


def test_a_load_does_not_write_over_its_snapshot(setting: Setting) -> None:
    before = setting.listing()
    for path in (setting.snapshot, setting.stream):
        fd = os.open(path, os.O_RDWR)
        with open_snapshot(path) as snapshot:
            length = snapshot.blocks[NAME].length
            memory = FileMemory(fd, 0, min(length, path.stat().st_size // 4096 * 4096))
            with pytest.raises(UsageError, match="the file that is to be loaded"):
                snapshot.load({NAME: memory})
        os.close(fd)
    assert setting.listing() == before


# ---- what is not ours ----------------------------------------------------------------------------


def letter(path: Path) -> None:
    path.write_text("dear reader")


def directory(path: Path) -> None:
    path.mkdir()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    """A node of our own, which reads as empty: never one of the system's."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes device nodes")


def block_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(240, 77))  # no driver
    except PermissionError:
        pytest.skip("only root makes device nodes")


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


FOREIGN = [letter, directory, fifo, device, block_device, unix_socket]
SPECIAL = FOREIGN[1:]

# The arguments, and the file beside that must not be replaced.
Owned = Callable[[Setting], tuple[list[str | Path], Path]]
OUTPUTS: dict[str, tuple[Owned, list[Callable[[Path], None]]]] = {
    "pack": (
        lambda s: (["pack", s.directory / "new", f"{NAME}={s.memory}"], s.directory / "new"),
        SPECIAL,
    ),
    "pack --offset": (
        lambda s: (
            ["pack", s.directory / "new", f"{NAME}={s.memory}", "--offset", "4k"],
            s.directory / "new",
        ),
        SPECIAL,
    ),
    "pack --seal": (
        lambda s: (
            ["pack", s.directory / "new", f"{NAME}={s.memory}", "--seal"],
            s.directory / "new.seal",
        ),
        FOREIGN,
    ),
    "seal": (lambda s: (["seal", s.memory.with_name("link")], s.directory / "link.seal"), FOREIGN),
    **{
        f"convert --to {form}": (
            lambda s, form=form: (  # type: ignore[misc]
                [
                    "convert",
                    s.snapshot,
                    s.directory / "new",
                    "--to",
                    form,
                    *(["--map", f"{NAME}@0"] if form in ("elf", "lime") else []),
                ],
                s.directory / "new",
            ),
            SPECIAL,
        )
        for form in ("mapped-ram", "stream", "elf", "lime")
    },
    "convert --to raw": (
        lambda s: (
            ["convert", s.snapshot, s.directory / "out", "--to", "raw"],
            s.directory / f"out/{NAME}.raw",
        ),
        SPECIAL,
    ),
    "unpack": (
        lambda s: (["unpack", s.stream, s.directory / "out"], s.directory / f"out/{NAME}.raw"),
        SPECIAL,
    ),
    "unpack, the list": (
        lambda s: (["unpack", s.snapshot, s.directory / "out"], s.directory / "out/blocks.json"),
        FOREIGN,
    ),
    **{
        f"{verb} --index": (
            lambda s, verb=verb: (  # type: ignore[misc]
                [verb, s.stream, "--index", s.directory / "index"],
                s.directory / "index",
            ),
            FOREIGN,
        )
        for verb in ("info", "verify")
    },
    "bench --plot": (
        lambda s: (
            ["bench", "--dir", s.directory, "--plot", s.directory / "picture.png"],
            s.directory / "picture.png",
        ),
        FOREIGN,
    ),
}


@pytest.fixture
def in_directory(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    monkeypatch.chdir(setting.directory)  # names of sockets are short
    (setting.directory / "out").mkdir()
    os.link(setting.snapshot, setting.directory / "link")
    yield setting


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("output", "make"), [(name, make) for name, (_, makers) in OUTPUTS.items() for make in makers]
)
def test_a_file_of_another_kind_is_not_replaced(
    in_directory: Setting, command: Command, output: str, make: Callable[[Path], None]
) -> None:
    if output == "bench --plot":
        pytest.importorskip("matplotlib")
    arguments, place = OUTPUTS[output][0](in_directory)
    make(place)
    before = in_directory.listing()
    ran = command(*arguments)
    # A directory where a snapshot is to be is the system's refusal, as it always was.
    assert ran.code == (
        3
        if make is directory and output.startswith(("pack", "convert --to")) and place.name == "new"
        else 2
    ), ran
    assert place.name in ran.err
    assert in_directory.listing() == before


@pytest.mark.parametrize("content", [b"", None])
def test_an_index_replaces_an_empty_file_and_an_index(
    setting: Setting, command: Command, content: bytes | None
) -> None:
    index = setting.directory / "index"
    if content is None:
        assert command("info", setting.snapshot).code == 0
        assert command("info", setting.stream, "--index", index).code == 0
        start_sequential_save(setting.stream, [RamBlock(NAME, pages(32, 4))]).wait()
        before = index.read_bytes()
    else:
        before = content
        index.write_bytes(content)
    assert command("info", setting.stream, "--index", index).code == 0
    assert index.read_bytes() not in (b"", before)


def test_unpack_replaces_what_an_earlier_one_made(setting: Setting, command: Command) -> None:
    out = setting.directory / "out"
    assert command("unpack", setting.snapshot, out).code == 0
    assert command("unpack", setting.stream, out).code == 0
    assert (out / f"{NAME}.raw").read_bytes() == pages(16, 3)
