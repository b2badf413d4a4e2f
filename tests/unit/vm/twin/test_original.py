"""What a twin may be of: a process, as far as this one may stand for it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyqmigrate.errors import NotSupported
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.twin.original import Original

CAT = shutil.which("cat") or "/bin/cat"


@contextmanager
def running(*words: str, cwd: Path | None = None) -> Iterator[int]:
    """A process that waits; its number."""
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=cwd
    ) as process:
        yield process.pid


def test_command_line_and_directory_are_the_process_s(tmp_path: Path) -> None:
    with running(CAT, "-", "a b", cwd=tmp_path) as pid:
        original = Original.of_process(pid)
    try:
        assert original.command.argv() == [CAT, "-", "a b"]
        assert original.command.directory == str(tmp_path.resolve())
        assert original.before == ()
        # The process is gone, and its program can still be started.
        assert os.path.samestat(os.fstat(original.program), Path(CAT).stat())
    finally:
        original.close()


def test_process_that_is_not_there_is_refused() -> None:
    with running(CAT) as pid:
        pass
    for number in (None, pid):
        with pytest.raises(NotSupported):
            Original.of_process(number)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may run programs of others")
def test_program_that_others_may_write_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "qemu"
    shutil.copy(CAT, copy)
    for mode, owner in ((0o757, 0), (0o755, 65534)):
        copy.chmod(mode)
        os.chown(copy, owner, 0)
        with running(str(copy)) as pid, pytest.raises(NotSupported, match="program"):
            Original.of_process(pid)


def test_given_command_runs_with_our_own_rights() -> None:
    original = Original.of_command(CommandLine.parse(["qemu-system-x86_64", "-S"]))
    assert (original.program, original.before) == (-1, ())
    original.close()
