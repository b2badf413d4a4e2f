"""Set the guest's clock through the guest agent.

QEMU connects a UNIX socket of the host to a serial port of the guest, where qemu-ga answers JSON
commands from one client at a time. Its answers are untrusted: length and time are bounded, and
only the success of a command is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from pyqmigrate.errors import QemuError, UsageError
from pyqmigrate.vm.guest.disks import seen_here
from pyqmigrate.vm.guest.process import command_of

__all__ = ["find_agent", "set_time"]

_PORT = "org.qemu.guest_agent.0"
_DELIMITER = b"\xff"  # never in JSON: everything before it answers an earlier client
_LONGEST_ANSWER = 1 << 16  # bytes


def find_agent(pid: int | None) -> Path | None:
    """Return the agent's socket in the command line of QEMU ``pid``; None without one."""
    command = None if pid is None else command_of(pid)
    if command is None:
        return None
    try:
        chardevs = {
            properties.get("id"): properties
            for properties in (option.properties("backend") for option in command.all("chardev"))
        }
        for option in command.all("device"):
            device = option.properties("driver")
            if device.get("driver") == "virtserialport" and device.get("name") == _PORT:
                chardev = chardevs.get(device.get("chardev", ""), {})
                if chardev.get("backend") == "socket" and "path" in chardev:
                    return seen_here(pid, chardev["path"])
    except UsageError:  # an option with invalid JSON
        pass
    return None


async def set_time(agent: Path, *, timeout: float) -> None:
    """Set the guest's clock to the host's time, by the agent at the socket ``agent``.

    Raises QemuError with the reason when that has not succeeded within ``timeout`` seconds.
    """
    try:
        async with asyncio.timeout(timeout):
            await _set_time(agent)
    except TimeoutError:
        raise QemuError(
            f"the agent at {agent} has not answered within {timeout:g} s: it is not running in "
            "the guest, or another client holds the socket"
        ) from None
    except (OSError, EOFError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "it hung up"
        raise QemuError(f"no connection to the agent at {agent}: {why}") from error


async def _set_time(agent: Path) -> None:
    directory = os.open(agent.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:  # a path of any length
        short = f"/proc/self/fd/{directory}/{agent.name}"
        reader, writer = await asyncio.open_unix_connection(short, limit=_LONGEST_ANSWER)
    finally:
        os.close(directory)
    try:
        identity = secrets.randbits(31)
        writer.write(_DELIMITER + _command("guest-sync-delimited", id=identity))
        while True:
            await _until(reader, _DELIMITER)
            if await _answer(reader) == identity:
                break  # other ids answer an earlier client
        writer.write(_command("guest-set-time", time=time.time_ns()))
        await _answer(reader)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _command(name: str, **arguments: object) -> bytes:
    return json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"


async def _until(reader: asyncio.StreamReader, end: bytes) -> bytes:
    try:
        return await reader.readuntil(end)
    except asyncio.LimitOverrunError:
        raise QemuError("the agent's answer is too long") from None


async def _answer(reader: asyncio.StreamReader) -> Any:
    """Return the result of a command. QemuError if it failed, or if the answer is invalid."""
    try:
        answer = json.loads((await _until(reader, b"\n")).rpartition(_DELIMITER)[2])
    except (ValueError, RecursionError) as error:
        raise QemuError("the agent's answer is not JSON") from error
    if isinstance(answer, dict) and "return" in answer:
        return answer["return"]
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        raise QemuError(f"the agent refused: {str(answer['error'].get('desc', ''))[:200]!r}")
    raise QemuError("the agent's answer is neither a result nor an error")
