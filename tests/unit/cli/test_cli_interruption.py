"""Signals that end a command in whose event loop work is under way."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pyqmigrate.cli

WORK = """
import asyncio, sys
from pyqmigrate.cli.interruption import run_interruptible

async def answer():
    await asyncio.sleep(0.3)
    return "restored"

async def work():
    session = asyncio.create_task(asyncio.sleep(60))  # as the reader of a monitor
    try:
        print("works", flush=True)
        await asyncio.sleep(60)
    finally:
        print(await asyncio.shield(asyncio.create_task(answer())), session.done(), flush=True)

try:
    run_interruptible(work())
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_leaves_the_loop_whole_until_the_work_has_cleaned_up(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "works\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == "restored False\n"
    assert process.returncode == 130


def test_result_and_handlers_are_as_they_were_without_a_signal() -> None:
    from pyqmigrate.cli.interruption import run_interruptible

    async def work() -> int:
        assert signal.getsignal(signal.SIGTERM) != before
        return 7

    before = signal.getsignal(signal.SIGTERM)
    assert run_interruptible(work()) == 7
    assert signal.getsignal(signal.SIGTERM) == before


def test_every_verb_runs_its_loop_so() -> None:
    sources = Path(pyqmigrate.cli.__file__).parent.rglob("*.py")
    found = {
        path.name
        for path in sources
        if re.search(r"asyncio\.(run|Runner)\(|run_until_complete", path.read_text())
    }
    assert found == {"interruption.py"}


def test_signal_before_the_loop_is_there_cancels_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyqmigrate.cli.interruption import run_interruptible

    done = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            done.append(True)

    make = asyncio.new_event_loop

    def interrupted() -> asyncio.AbstractEventLoop:
        os.kill(os.getpid(), signal.SIGINT)
        return make()

    monkeypatch.setattr(asyncio.events, "new_event_loop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_interruptible(work())
    assert done
