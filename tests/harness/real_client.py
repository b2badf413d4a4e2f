"""A program: drives the server at a socket with the client library that managers use.

A program of its own, since on the tests' path the name ``qemu`` stands for something else.
Usage: real_client.py SOCKET FILE
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from qemu.qmp import ExecuteError, QMPClient


async def drive(socket: str, path: Path) -> None:
    client = QMPClient("test")
    await client.connect(socket)
    await client.execute(
        "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}
    )
    with path.open("wb") as file:
        client.send_fd_scm(file.fileno())
        added = await client.execute("add-fd", {"fdset-id": 1, "opaque": "wr:buffered"})
    assert added["fdset-id"] == 1, added
    with client.listener("MIGRATION") as listener:
        await client.execute("migrate", {"uri": "file:/dev/fdset/1,offset=0x1000"})
        seen = [(await listener.get())["data"]["status"] for _ in range(3)]
    assert seen == ["setup", "active", "completed"], seen
    assert path.stat().st_size == 4096
    await client.execute("remove-fd", {"fdset-id": 1})
    assert await client.execute("query-fdsets") == []
    try:
        await client.execute("no-such-command")
    except ExecuteError as refused:
        assert refused.error_class == "CommandNotFound", refused
    else:
        raise AssertionError("an unknown command was carried out")
    await client.disconnect()


if __name__ == "__main__":
    asyncio.run(drive(sys.argv[1], Path(sys.argv[2])))
