"""A drgn program of a snapshot, without a Linux in it; tests/qemu/test_analysis_tools.py has one."""

from __future__ import annotations

import gc
import gzip
import os
from pathlib import Path

import pytest

from pyqmigrate import NotSupported, RamBlock, compact, open_snapshot, parse_placement, save
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from tests.harness.snapshots import ram

drgn = pytest.importorskip("drgn")
program = pytest.importorskip("pyqmigrate.integrations.drgn").program
command = pytest.importorskip("pyqmigrate.integrations.drgn").main

MEMORY = ram(900, seed=1).tobytes()
MACHINE = "pc-q35-10.0"
ADDRESS = 0x100000  # the same offset of the block
DATA = MEMORY[ADDRESS : ADDRESS + 3 * 4096]


def made(path: Path, kind: str = "mapped-ram", machine: str = MACHINE) -> Path:
    blocks = [RamBlock("pc.ram", MEMORY)]
    if kind in ("stream", "gzip"):
        start_sequential_save(path, blocks, machine=machine).wait()
    else:
        save(path, blocks, machine=machine)
    if kind == "gzip":
        path.write_bytes(gzip.compress(path.read_bytes(), 1))
    if kind == "compact":
        compact(path, path.with_name("c"))
        return path.with_name("c")
    return path


@pytest.mark.parametrize("kind", ["mapped-ram", "stream", "gzip", "compact"])
def test_program_reads_physical_memory_of_every_kind(tmp_path: Path, kind: str) -> None:
    prog = program(made(tmp_path / "s", kind))
    assert prog.read(ADDRESS, len(DATA), physical=True) == DATA
    assert prog.platform.arch is drgn.Architecture.X86_64


def test_address_without_memory_is_a_fault(tmp_path: Path) -> None:
    prog = program(made(tmp_path / "s"))
    with pytest.raises(drgn.FaultError):
        prog.read(0x8000_0000, 8, physical=True)


def test_damage_that_is_read_is_a_fault_that_names_it(tmp_path: Path) -> None:
    path = made(tmp_path / "s")
    prog = program(path)
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(drgn.FaultError, match=r"truncated.*pc\.ram"):
        prog.read(0x300000, 0x80000, physical=True)


def test_file_is_closed_along_with_the_program(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    prog = program(made(tmp_path / "s"))
    assert len(os.listdir("/proc/self/fd")) > before
    del prog
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_snapshot_of_the_caller_stays_open(tmp_path: Path) -> None:
    with open_snapshot(made(tmp_path / "s")) as snapshot:
        prog = program(snapshot)
        assert prog.read(ADDRESS, 4096, physical=True) == DATA[:4096]
        del prog
        gc.collect()
        assert snapshot.blocks["pc.ram"].read(ADDRESS, 4096) == DATA[:4096]


def test_memory_is_placed_by_hand(tmp_path: Path) -> None:
    path = made(tmp_path / "s", machine="unheard-of")
    with pytest.raises(NotSupported, match="unheard-of"):
        program(path)
    path = made(tmp_path / "t")
    prog = program(path, placements=[parse_placement("pc.ram@0x40000000")])
    assert prog.read(0x4000_0000 + ADDRESS, 4096, physical=True) == DATA[:4096]


def test_given_vmcoreinfo_is_used_without_a_search(tmp_path: Path) -> None:
    note = b"OSRELEASE=6.1.0-made-up\nPAGESIZE=4096\nKERNELOFFSET=0\nSYMBOL(swapper_pg_dir)=ffffffff82a10000\n"
    prog = program(made(tmp_path / "s"), vmcoreinfo=note)
    assert prog.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    assert prog["UTS_RELEASE"].string_() == b"6.1.0-made-up"


def test_command_runs_a_script_with_its_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nprint(sys.argv[1:], prog.read(int(sys.argv[1], 0), 4, physical=True).hex())"
    )
    assert command([str(made(tmp_path / "s")), str(script), hex(ADDRESS), "--", "-x"]) == 0
    assert capsys.readouterr().out == f"['{ADDRESS:#x}', '-x'] {DATA[:4].hex()}\n"


def test_command_runs_a_statement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([str(made(tmp_path / "s")), "-e", "print(prog.platform.arch.name)"]) == 0
    assert capsys.readouterr().out == "X86_64\n"


def test_command_says_what_is_not_a_snapshot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("not a snapshot")
    assert command([str(tmp_path / "text"), "-e", "0"]) == 2
    assert "not a migration stream" in capsys.readouterr().err
