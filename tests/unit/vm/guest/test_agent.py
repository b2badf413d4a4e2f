"""Setting the guest's clock by its agent, whatever that answers."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.errors import QemuError
from pyqmigrate.vm.guest.agent import find_agent, set_time
from pyqmigrate.vm.guest.clock import correct_clock, note_on_clock
from tests.harness.agent import Agent


def set_by(path: Path, timeout: float = 10) -> None:
    asyncio.run(set_time(path, timeout=timeout))


def test_agent_is_given_the_time_of_the_host(tmp_path: Path) -> None:
    before = time.time_ns()
    with Agent(tmp_path / "agent") as agent:
        set_by(tmp_path / "agent")
    [told] = agent.times
    assert before <= told <= time.time_ns()


@pytest.mark.parametrize(
    "before",
    [b'{"return": 17}\n', b"half an answ", b'\xff{"return": 5}\n', b'\xff\xff{"return": {}}\n'],
)
def test_answers_to_another_client_are_passed_over(before: bytes, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", before=before) as agent:
        set_by(tmp_path / "agent")
    assert len(agent.times) == 1


def test_agent_of_a_long_path_is_reached(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    (tmp_path / "short").symlink_to(deep)
    with Agent(tmp_path / "short" / "agent") as agent:
        set_by(deep / "agent")
    assert len(agent.times) == 1


def test_refusal_is_given_in_the_words_of_the_agent(tmp_path: Path) -> None:
    with (
        Agent(tmp_path / "agent", refuses=True),
        pytest.raises(QemuError, match="refused: 'Failed to set time"),
    ):
        set_by(tmp_path / "agent")


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (b"\xff{]\n", "not JSON"),
        (b"\xff" + b"[" * 60_000 + b"\n", "not JSON"),
        (b"\xff17\n", "neither a result nor an error"),
        (b'\xff{"error": "no"}\n', "neither a result nor an error"),
        (b"x" * 300_000, "too long"),
        (b"\xff" + b"x" * 300_000, "too long"),
    ],
)
def test_answer_that_is_none_is_an_error(says: bytes, message: str, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", says=says), pytest.raises(QemuError, match=message):
        set_by(tmp_path / "agent")


def test_agent_that_does_not_answer_costs_no_more_than_the_time_it_is_given(tmp_path: Path) -> None:
    with (
        Agent(tmp_path / "agent", silent=True),
        pytest.raises(QemuError, match=r"has not answered within 0\.1 s"),
    ):
        set_by(tmp_path / "agent", 0.1)


def test_agent_that_no_process_serves_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QemuError, match="No such file"):
        set_by(tmp_path / "agent")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "agent"))
    with pytest.raises(QemuError, match="refused"):
        set_by(tmp_path / "agent")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-chardev", "socket,path=SOCKET,server=on,wait=off,id=ga"], "SOCKET"),
        (["-chardev", '{"backend": "socket", "path": "SOCKET", "id": "ga"}'], "SOCKET"),
        (["-chardev", "socket,id=other,path=SOCKET"], None),
        (["-chardev", "pty,id=ga"], None),
        (["-chardev", "socket,id=ga,fd=7"], None),
    ],
)
def test_agent_is_found_in_the_command_line(
    words: list[str], expected: str | None, tmp_path: Path
) -> None:
    path = str(tmp_path / "agent.sock")
    Path(path).touch()
    device = ["-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0"]
    command = [word.replace("SOCKET", path) for word in (*words, *device)]
    program = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        found = find_agent(process.pid)
        process.stdin.close()
    if expected is None:
        assert found is None
    else:
        assert found is not None and str(found).endswith(path)


def corrected(*arguments: Any) -> str:
    [note] = asyncio.run(correct_clock(*arguments))
    return note


def test_what_became_of_the_clock_is_a_note(tmp_path: Path) -> None:
    with Agent(tmp_path / "agent"):
        assert "was set" in corrected(None, tmp_path / "agent")
    assert "was not set: no connection" in corrected(None, tmp_path / "nowhere")
    assert "--guest-agent" in corrected(None, None)


@pytest.mark.parametrize(
    ("behind", "words"),
    [
        (0.0, None),
        (0.9, None),
        (3.0, "about 3 s"),
        (600.0, "10 minutes"),
        (9000.0, "2 hours"),
        (400_000.0, "5 days"),
    ],
)
def test_clock_that_is_behind_is_worth_a_note(behind: float, words: str | None) -> None:
    notes = note_on_clock(behind)
    assert len(notes) == (words is not None)
    if words is not None:
        assert words in notes[0] and "makestep" in notes[0] and "guest-set-time" in notes[0]
