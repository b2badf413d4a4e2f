"""A program: takes steps for the client library that managers use, and says what came of each.

A program of its own, since on the tests' path the name ``qemu`` stands for something else.
Its standard input is a SOCK_SEQPACKET socket. Each packet is a step in JSON, a descriptor that
the step hands to the server comes along, and one packet answers each step:

    {"connect": NAME, "socket": PATH}, {"close": NAME}, or
    {"client": NAME, "execute": COMMAND, "arguments": {...}}, also with "wait": EVENT_STATUSES

"wait" makes the step last until a MIGRATION event has one of these statuses. The answer is the
reply as the server sent it, without its id, and "events", those since the last answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

LIMIT = 1 << 17


class Connection:
    """One client, and every event that it heard."""

    def __init__(self) -> None:
        self.client = QMPClient("steps")
        self.listener = EventListener()
        self.client.register_listener(self.listener)

    async def step(self, step: dict, fds: list[int]) -> dict:
        for fd in fds:
            self.client.send_fd_scm(fd)
            os.close(fd)
        answer = {}
        try:
            answer["return"] = await self.client.execute(step["execute"], step.get("arguments"))
        except ExecuteError as refused:
            answer["error"] = {"class": refused.error_class, "desc": refused.error.error.desc}
        answer["events"] = events = []
        if "return" in answer and "wait" in step:
            async with asyncio.timeout(60):
                while True:
                    events.append(dict(await self.listener.get()))
                    if events[-1].get("data", {}).get("status") in step["wait"]:
                        break
        events += [dict(event) for event in self.listener.clear()]
        return answer


async def main() -> None:
    loop = asyncio.get_running_loop()
    steps = socket.socket(fileno=0)
    connections: dict[str, Connection] = {}
    while True:
        data, fds, _, _ = await loop.run_in_executor(None, socket.recv_fds, steps, LIMIT, 8)
        if not data:
            return
        step = json.loads(data)
        try:
            if "connect" in step:
                connection = connections[step["connect"]] = Connection()
                await connection.client.connect(step["socket"])
                answer = {"return": {}}
            elif "close" in step:
                await connections.pop(step["close"]).client.disconnect()
                answer = {"return": {}}
            else:
                answer = await connections[step["client"]].step(step, fds)
        except (QMPError, EOFError, OSError, TimeoutError) as error:
            answer = {"broken": f"{type(error).__name__}: {error}"}
        steps.send(json.dumps(answer).encode())


if __name__ == "__main__":
    asyncio.run(main())
