"""Where a monitor listens, as a user writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.qapi.monitor_address import monitor_path


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("/run/guest.qmp", "/run/guest.qmp"),
        ("unix:/run/guest.qmp", "/run/guest.qmp"),
        ("guest.qmp", "guest.qmp"),
        ("unix:guest.qmp", "guest.qmp"),
        ("./tcp:4444", "./tcp:4444"),
        ("/run/a:1", "/run/a:1"),
        ("unix:tcp:1", "tcp:1"),
        ("/run/a,server", "/run/a,server"),
        (Path("unix:x"), "unix:x"),
    ],
)
def test_path_and_unix_path_are_the_same(address: str | Path, path: str) -> None:
    assert monitor_path(address) == Path(path)


@pytest.mark.parametrize(
    "address", ["tcp:localhost:4444", "localhost:4444", ":4444", "telnet::1", "fd:5", "vsock:3:1"]
)
def test_other_kinds_are_refused_with_the_reason(address: str) -> None:
    with pytest.raises(UsageError, match="not a UNIX socket, and no other carries descriptors"):
        monitor_path(address)


@pytest.mark.parametrize("address", ["", "unix:"])
def test_no_path_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="has no path"):
        monitor_path(address)


@pytest.mark.parametrize("options", [",server=on,wait=off", ",server,nowait", ",wait=off"])
def test_options_of_qemu_are_refused_with_what_to_give(options: str) -> None:
    with pytest.raises(UsageError, match=r"give unix:/run/q$"):
        monitor_path(f"unix:/run/q{options}")
