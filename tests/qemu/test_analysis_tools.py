"""Exports of a running Linux, opened by the tools that they are for."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import pyqmigrate
from pyqmigrate.compaction import compact
from pyqmigrate.export.convert import convert
from pyqmigrate.format.device.cpu import cpu_registers
from pyqmigrate.format.device.decode import decode_devices
from pyqmigrate.qmp.client import QmpClient
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.store.adding import add
from pyqmigrate.store.store import Store
from tests.harness.libvirt import RAM, Libvirt
from tests.harness.libvirt import save as save_by_libvirt
from tests.harness.linux_guest import LinuxGuest
from tests.harness.physical import Physical
from tests.harness.registers import registers_said
from tests.harness.unpacked import lack, unpacked
from tests.harness.verbs import save

pytestmark = pytest.mark.qemu

SCHEME = "pyqmigrate"
PLUGINS = Path(pyqmigrate.__path__[0]) / "integrations" / "volatility3_plugins"
FORMS = ["elf", "lime"]
LAYERS = {"elf": "Elf64Layer", "lime": "LimeLayer"}
VOLATILITY = "import sys; sys.argv[0] = 'vol'; from volatility3.cli import main; main()"


@dataclass(frozen=True)
class Linux:
    """What a guest said of itself, and the files it became, by their forms.

    ``banner`` is the line of /proc/version and ``banner_at`` the kernel's own address of it;
    ``registers`` are QEMU's of the first CPU when it was saved.
    """

    release: str
    banner: str
    banner_at: int
    registers: dict[str, int]
    files: dict[str, Path]
    snapshot: Path

    def as_kind(self, kind: str) -> Path | str:
        """The snapshot as one of that kind."""
        path = self.snapshot.with_name(kind)
        if kind == "compact":
            compact(self.snapshot, path)
        elif kind == "stream":
            convert(self.snapshot, path, to="stream")
        elif kind == "store":
            with Store.create(path) as store:
                add(store, self.snapshot, name="s")
            return f"{path}#s"
        return path if path.exists() else self.snapshot


@pytest.fixture(scope="module")
def linux(module_disk: Path) -> Linux:
    """Booted, stopped, saved and exported once."""
    guest = LinuxGuest(module_disk)
    with guest.boot() as console:
        release, banner = console.run("uname -r"), console.run("cat /proc/version")
        symbol = console.run("grep ' linux_banner$' /proc/kallsyms")
        with QmpClient.connect(guest.qmp) as qmp:
            qmp.execute("stop")
            text = qmp.execute("human-monitor-command", {"command-line": "info registers"})
        save(guest.qmp, module_disk / "s", "--engine", "qemu")
    files = {form: module_disk / form for form in FORMS}
    for form, path in files.items():
        convert(module_disk / "s", path, to=form)
    address = int(symbol.split()[0], 16)
    return Linux(release, banner, address, registers_said(text), files, module_disk / "s")


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        lack(f"{name} is not on the PATH: run .ci/ensure-system qemu")
    return path


def need(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError:
        lack(f"{module} is not installed: it is in the extra 'test'")


def volatility(path: Path | str, *words: str) -> subprocess.CompletedProcess[str]:
    need("volatility3.framework")
    return subprocess.run(
        [sys.executable, "-c", VOLATILITY, "-q", "--offline", "-f", str(path), *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def gdb(path: Path, *commands: str) -> str:
    words = [word for command in commands for word in ("-ex", command)]
    return subprocess.run(
        [program("gdb"), "-nx", "-batch", *words, "-core", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


@pytest.mark.parametrize("form", ["elf", pytest.param("lime", marks=pytest.mark.long)])
def test_volatility_finds_the_banner_of_the_kernel(linux: Linux, form: str) -> None:
    ran = volatility(linux.files[form], "-vv", "-r", "json", "banners.Banners")
    rows = json.loads(ran.stdout[ran.stdout.index("[") :])
    assert linux.banner in {row["Banner"].strip("\n\0") for row in rows}
    assert re.search(rf"layers: \[.*'{LAYERS[form]}', 'FileLayer'\]", ran.stderr), ran.stderr


def test_gdb_has_registers_and_memory(linux: Linux) -> None:
    names = ["rip", "rsp", "rax", "rbp", "r8", "r15"]
    address = 0x1000000  # where a kernel of x86 is
    said = gdb(
        linux.files["elf"],
        *(f'printf "%lx\\n", ${name}' for name in names),
        f"output/x *(unsigned long *) {address}",
    ).splitlines()[-len(names) - 1 :]
    assert [int(value, 16) for value in said[:-1]] == [linux.registers[n] for n in names]
    memory = Physical.of_elf(linux.files["elf"]).read(address, 8)
    assert memory != bytes(8)
    assert int(said[-1], 16) == int.from_bytes(memory, "little")


@pytest.mark.parametrize("form", ["sparse", pytest.param("raw", marks=pytest.mark.long)])
def test_gdb_reads_what_libvirt_saved(form: str, disk: Path) -> None:
    # Socket paths are short, so this is not pytest's directory.
    with tempfile.TemporaryDirectory(prefix="lv-") as name, Libvirt(Path(name)) as libvirt:
        image = save_by_libvirt(libvirt, disk, "q35", "--image-format", form)
    convert(image.path, disk / "elf", to="elf")
    with open_snapshot(image.path) as snapshot:
        memory = snapshot.blocks["pc.ram"].read(0, RAM)
        [cpu] = cpu_registers(decode_devices(snapshot.source, snapshot.stream, name="cpu"))
    address = next(at for at in range(1 << 20, RAM, 8) if memory[at : at + 8] != bytes(8))
    said = gdb(
        disk / "elf", 'printf "%lx\\n", $rip', f"output/x *(unsigned long *) {address}"
    ).splitlines()[-2:]
    assert [int(line, 16) for line in said] == [
        cpu.general["rip"],
        int.from_bytes(memory[address : address + 8], "little"),
    ]


def test_readelf_has_nothing_to_object_to(linux: Linux) -> None:
    ran = subprocess.run(
        [program("readelf"), "-aW", str(linux.files["elf"])],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stderr == ""
    assert "NT_PRSTATUS" in ran.stdout
    assert "VMCOREINFO" in ran.stdout


def test_crash_knows_the_kernel(linux: Linux) -> None:
    """Without the kernel's debug information, hundreds of MiB, it opens the file and no more."""
    root = unpacked("crash")
    libraries = ":".join(map(str, root.glob("usr/lib/*-linux-gnu*")))
    ran = subprocess.run(
        [root / "usr/bin/crash", "--osrelease", linux.files["elf"]],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"LD_LIBRARY_PATH": libraries},
    )
    assert ran.stdout.strip() == linux.release


DRGN = (
    "import drgn, json, sys\n"
    "{program}\n"
    "banner = program.read_c_string(int(sys.argv[2])).decode()\n"
    "print(json.dumps([bool(program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL),"
    " program['UTS_RELEASE'].string_().decode(), banner]))\n"
)
OF_CORE = "program = drgn.Program()\nprogram.set_core_dump(sys.argv[1])"
OF_SNAPSHOT = (
    "from pyqmigrate.integrations.drgn import program as made\nprogram = made(sys.argv[1])"
)


def drgn(name: Path | str, address: int, made: str) -> object:
    need("drgn")
    ran = subprocess.run(
        [sys.executable, "-c", DRGN.format(program=made), str(name), str(address)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(ran.stdout)


def test_drgn_reads_the_kernel_by_its_own_addresses(linux: Linux) -> None:
    said = drgn(linux.files["elf"], linux.banner_at, OF_CORE)
    assert said == [True, linux.release, linux.banner + "\n"]


@pytest.mark.parametrize(
    "kind",
    [
        "mapped-ram",
        *(pytest.param(k, marks=pytest.mark.long) for k in ("compact", "stream", "store")),
    ],
)
def test_drgn_reads_the_same_from_a_snapshot(linux: Linux, kind: str) -> None:
    said = drgn(linux.as_kind(kind), linux.banner_at, OF_SNAPSHOT)
    assert said == [True, linux.release, linux.banner + "\n"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["{}", f"{SCHEME}:{{}}"])
def test_volatility_finds_the_same_in_a_snapshot_as_in_its_core(linux: Linux, name: str) -> None:
    ran = volatility(
        name.format(linux.snapshot), "-vv", "-p", str(PLUGINS), "-r", "json", "banners.Banners"
    )
    of_core = volatility(linux.files["elf"], "-r", "json", "banners.Banners")
    rows = ran.stdout[ran.stdout.index("[") :]
    assert json.loads(rows) == json.loads(of_core.stdout[of_core.stdout.index("[") :])
    assert re.search(r"layers: \[.*'Elf64Layer', ('SnapshotLayer', )?'FileLayer'\]", ran.stderr)
