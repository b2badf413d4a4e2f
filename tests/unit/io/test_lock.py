"""Locks between programs that read a file and programs that change it in place."""

import errno
import fcntl
from pathlib import Path

import pytest

from pyqmigrate.io.lock import lock_file


def test_readers_exclude_a_writer_and_not_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with path.open("rb") as reader, path.open("rb") as other, path.open("r+b") as writer:
        lock_file(reader.fileno(), exclusive=False)
        lock_file(other.fileno(), exclusive=False)
        with pytest.raises(BlockingIOError):
            lock_file(writer.fileno(), exclusive=True)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_locks_nothing(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, kind: int) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock_file(0, exclusive=True)


def test_any_other_error_is_raised() -> None:
    with pytest.raises(OSError) as caught:
        lock_file(-1 & 0xFFFF, exclusive=True)
    assert caught.value.errno == errno.EBADF
