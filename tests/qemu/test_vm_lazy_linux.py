"""A Linux goes on from a store that is far away, before its memory is there: a shell, files, a compiler."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyqmigrate import seal
from pyqmigrate.store import Store, add
from pyqmigrate.vm.incoming.lazy_status import wait_for_memory
from tests.harness.linux_guest import Console, LinuxGuest
from tests.harness.object_store import ObjectStore, object_store
from tests.harness.verbs import restored, save

__all__ = ["object_store"]

pytestmark = [pytest.mark.qemu, pytest.mark.long, pytest.mark.timeout(900)]

DELAY = 0.02  # seconds for each request
TWO_PROCESSORS = ("-smp", "2")
PATIENCE = 300.0  # seconds
FUNCTIONS = 60


def compiler() -> dict[str, bytes]:
    """The C compiler, assembler and linker of this host, for the guest's ``/bin``."""
    found: dict[str, Path] = {}
    for name in ("cc1", "as", "ld"):
        asked = subprocess.run(
            ["cc", f"-print-prog-name={name}"], capture_output=True, text=True, check=True
        )
        path = shutil.which(asked.stdout.strip())
        if path is None:
            pytest.skip(f"this host has no {name}")
        found[name] = Path(path)
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        for library in re.findall(r"(/\S+)", listed):
            key = "ld.so" if "ld-linux" in library else os.path.basename(library)
            found[key] = Path(library)
    return {f"bin/{name}": path.read_bytes() for name, path in found.items()}


def run_compiler(console: Console, name: str) -> str:
    """Compile a program in the guest, run it, and return what it printed and the object's digest."""
    with_libraries = "/bin/ld.so --library-path /bin"
    return console.run(
        f"{with_libraries} /bin/cc1 -quiet -O2 -ffreestanding program.c -o {name}.s && "
        f"{with_libraries} /bin/as {name}.s -o {name}.o && "
        f"{with_libraries} /bin/ld {name}.o -o {name} && "
        f"./{name}; echo $?; md5sum < {name}.o",
        timeout=PATIENCE,
    )


def program() -> str:
    """A C program of many functions without a library; its exit status is a sum of their results."""
    functions = "\n".join(
        f"__attribute__((noinline)) long f{n}(long x) {{ long s = {n}; for (long i = 0; i < x; i++) "
        f"s = s * 31 + (i ^ {n * 7}); return s % 1009; }}"
        for n in range(FUNCTIONS)
    )
    calls = " + ".join(f"f{n}({n + 3})" for n in range(FUNCTIONS))
    return (
        f"{functions}\nvoid _start(void) {{ long s = ({calls}) & 127;\n"
        '__asm__ volatile("syscall" :: "a"(60L), "D"(s) : "rcx", "r11"); }\n'
    )


@dataclass(frozen=True)
class Saved:
    """``checksums`` are of files in the guest, ``compiled`` is what a compiler run said there."""

    guest: LinuxGuest
    path: Path
    checksums: str
    compiled: str


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Iterator[Saved]:
    files = compiler() | {"bin/program.c": program().encode()}
    guest = LinuxGuest(module_disk, megabytes=384, files=files)
    path = module_disk / "linux"
    with guest.boot(*TWO_PROCESSORS) as console:
        console.run(
            "cp /bin/program.c . && dd if=/dev/urandom of=random bs=64k count=256 2>/dev/null"
        )
        checksums = console.run(_CHECKSUMS, timeout=PATIENCE)
        compiled = run_compiler(console, "before")
        console.run("rm before*; (while sleep 0.05; do i=$((i + 1)); echo $i > count; done) &")
        save(guest.qmp, path, "--then", "quit")
    seal(path)
    yield Saved(guest, path, checksums, compiled)


_CHECKSUMS = "md5sum random /bin/* | sort"


@pytest.fixture
def far(
    saved: Saved, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The name of the snapshot in a store that answers late."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    url = object_store.url("guests")
    with Store.create(url) as store:
        add(store, saved.path, "linux")
    object_store.delay = DELAY
    yield f"{url}#linux"
    object_store.delay = 0


@pytest.mark.parametrize("push", ["idle", "always"])
def test_linux_answers_compiles_and_has_its_files(
    saved: Saved, far: str, tmp_path: Path, push: str
) -> None:
    path = tmp_path / "console"
    command = [*saved.guest.command(path), *TWO_PROCESSORS]
    started = time.monotonic()
    with (
        restored(far, command, "--mode", "lazy", "--push", push) as report,
        Console(path, PATIENCE) as console,
    ):
        assert (report["mode"], report["run_state"]) == ("lazy", "running")
        assert console.run("echo $((6 * 7))") == "42"
        answered = time.monotonic() - started
        assert run_compiler(console, "after") == saved.compiled
        compiled = time.monotonic() - started
        assert console.run(_CHECKSUMS) == saved.checksums
        asyncio.run(asyncio.wait_for(wait_for_memory(report["pid"]), PATIENCE))
        whole = time.monotonic() - started
        now = int(console.run("cat count"))
        console.run(f"until [ $(cat count) -gt {now + 3} ]; do sleep 0.02; done")
        log = console.run("dmesg")
        assert "Linux version" in log
        assert not re.search(r"BUG|Oops|corrupt|soft lockup|stall|Call Trace|segfault", log)
    print(f"answers {answered:.1f} s, compiled {compiled:.1f} s, all there {whole:.1f} s")
