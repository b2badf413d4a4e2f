"""One tree of exceptions, each also the nearest built-in."""

from __future__ import annotations

import errno
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import pyqmigrate
from pyqmigrate import (
    BlockMismatch,
    Cancelled,
    DirectIORefused,
    GuestMemoryError,
    JobTimeout,
    LiveSaveAbandoned,
    NoSpace,
    NotDurable,
    NotSupported,
    PyqmigrateError,
    QemuError,
    QemuGone,
    QemuRefused,
    RamBlock,
    SnapshotError,
    SnapshotTruncated,
    TargetError,
    UsageError,
)
from tests.harness.snapshots import known_memory, save_known


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (SnapshotError, ValueError),
        (SnapshotTruncated, SnapshotError),
        (UsageError, ValueError),
        (BlockMismatch, UsageError),
        (TargetError, OSError),
        (NoSpace, TargetError),
        (NotDurable, TargetError),
        (DirectIORefused, TargetError),
        (GuestMemoryError, OSError),
        (QemuError, RuntimeError),
        (QemuRefused, QemuError),
        (QemuGone, QemuError),
        (LiveSaveAbandoned, QemuError),
        (NotSupported, NotImplementedError),
        (Cancelled, RuntimeError),
        (JobTimeout, TimeoutError),
    ],
)
def test_each_error_is_of_the_tree_and_the_nearest_builtin(
    kind: type[Exception], builtin: type[Exception]
) -> None:
    assert issubclass(kind, PyqmigrateError)
    assert issubclass(kind, builtin)


def test_a_snapshot_error_says_where() -> None:
    error = SnapshotError("bad", offset=0x1234, block="pc.ram", field="length")
    assert (error.offset, error.block, error.field) == (0x1234, "pc.ram", "length")
    for word in ["bad", "0x1234", "pc.ram", "length"]:
        assert word in str(error)
    assert str(SnapshotError("bad")) == "bad"


def test_a_target_error_keeps_number_name_and_position() -> None:
    error = TargetError(errno.EIO, "cannot write", "/snap", position=0x2000)
    assert (error.errno, error.filename, error.position) == (errno.EIO, "/snap", 0x2000)
    for word in ["cannot write", "0x2000", "Input/output error", "/snap"]:
        assert word in str(error)


def test_no_space_is_enospc_unless_told_otherwise() -> None:
    assert NoSpace("full", "/snap").errno == errno.ENOSPC
    assert NoSpace("full", "/snap", errno=errno.EDQUOT).errno == errno.EDQUOT


def test_what_is_not_durable_is_said_to_be_there() -> None:
    error = NotDurable(errno.EIO, "/snap")
    assert (error.errno, error.filename, error.position) == (errno.EIO, "/snap", None)
    assert "is there and whole" in str(error)


def test_a_guest_memory_error_names_its_block() -> None:
    error = GuestMemoryError(errno.EFAULT, "gone", block="pc.ram")
    assert (error.errno, error.block) == (errno.EFAULT, "pc.ram")
    assert "pc.ram" in str(error)


def test_a_path_with_a_null_byte_is_a_usage_error(disk: Path) -> None:
    with pytest.raises(UsageError):
        pyqmigrate.save(f"{disk}/a\0b", [RamBlock("ram", known_memory())])
    with pytest.raises(UsageError):
        pyqmigrate.open_snapshot(f"{disk}/a\0b")


@pytest.mark.parametrize("target", [None, 5, 3.0, ["path"], ""])
def test_what_is_no_target_is_a_usage_error(target: object) -> None:
    with pytest.raises(UsageError):
        pyqmigrate.save(target, [RamBlock("ram", known_memory())])  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        pyqmigrate.open_snapshot(target)  # type: ignore[arg-type]


def test_a_missing_snapshot_is_a_target_error(disk: Path) -> None:
    with pytest.raises(TargetError) as caught:
        pyqmigrate.open_snapshot(disk / "none")
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(disk / "none")
    with pytest.raises(TargetError) as caught:
        pyqmigrate.open_snapshot(disk)
    assert caught.value.errno == errno.EISDIR


def test_the_logger_is_named_and_silent(disk: Path, child_environment: dict[str, str]) -> None:
    logger = logging.getLogger("pyqmigrate")
    assert any(isinstance(handler, logging.NullHandler) for handler in logger.handlers)
    script = (
        "import sys, pyqmigrate, signal\n"
        "before = [signal.getsignal(n) for n in signal.valid_signals()]\n"
        "pyqmigrate.save(sys.argv[1], [pyqmigrate.RamBlock('ram', bytes(4096))])\n"
        "pyqmigrate.open_snapshot(sys.argv[1]).load({'ram': bytearray(4096)})\n"
        "assert before == [signal.getsignal(n) for n in signal.valid_signals()]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, disk / "snap"],
        env=child_environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_was_saved_and_loaded_is_logged(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pyqmigrate"):
        memory = save_known(disk / "snap")
        pyqmigrate.open_snapshot(disk / "snap").load({"ram": bytearray(len(memory))})
    assert [r.name for r in caplog.records] == ["pyqmigrate", "pyqmigrate"]
    assert all(str(disk / "snap") in r.getMessage() for r in caplog.records)


def test_reports_and_progress_can_be_sent_to_another_process(disk: Path) -> None:
    job = pyqmigrate.start_save(disk / "snap", [RamBlock("ram", known_memory())])
    report = job.result(5)
    assert pickle.loads(pickle.dumps(report)) == report
    assert pickle.loads(pickle.dumps(job.progress)) == job.progress
