"""Requests that a keeper remembers: none is lost, whenever a worker dies."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Iterator

import pytest

from pyqmigrate.mount import protocol
from pyqmigrate.mount.remembered import RememberedRequests


def request(unique: int, operation: int = protocol.READ, size: int = 40) -> bytes:
    body = struct.pack("=QQI20x", 0, unique * 4096, 4096)[:size]
    return struct.pack("=IIQQIIIHH", 40 + len(body), operation, unique, 2, 0, 0, 1, 0, 0) + body


class Pipes:
    """A socket in place of /dev/fuse, and the requests behind it."""

    def __init__(self) -> None:
        self.kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        device.setblocking(False)
        self.device = device
        self.requests = RememberedRequests(device.fileno())
        self.ends: list[socket.socket] = []

    def worker(self) -> socket.socket:
        """Connect a new worker and return its end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        self.ends += [ours, theirs]
        self.requests.connect(ours)
        return theirs

    def waiting(self) -> list[int]:
        return [remembered.request.unique for remembered in self.requests.waiting()]


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    pipes = Pipes()
    yield pipes
    for end in (pipes.kernel, pipes.device, *pipes.ends):
        end.close()


def received(worker: socket.socket) -> list[int]:
    found = []
    try:
        while message := worker.recv(1 << 16):
            found.append(struct.unpack_from("=Q", message, 8)[0])
    except BlockingIOError:
        pass
    return found


def test_request_goes_to_the_worker_and_is_forgotten_when_it_is_answered(pipes: Pipes) -> None:
    worker = pipes.worker()
    pipes.kernel.send(request(2))
    pipes.kernel.send(request(4))
    pipes.requests.take_requests()
    assert received(worker) == [2, 4]
    worker.send((2).to_bytes(8, "little"))
    pipes.requests.take_answers()
    assert pipes.waiting() == [4]


def test_new_worker_gets_what_is_not_answered(pipes: Pipes) -> None:
    worker = pipes.worker()
    for unique in (2, 4, 6):
        pipes.kernel.send(request(unique))
    pipes.requests.take_requests()
    assert received(worker) == [2, 4, 6]
    worker.send((4).to_bytes(8, "little"))  # and dies before the keeper has heard it
    worker.close()
    pipes.requests.disconnect()
    pipes.kernel.send(request(8))
    pipes.requests.take_requests()
    assert received(pipes.worker()) == [2, 6, 8]


def test_interrupt_is_remembered_as_long_as_its_request(pipes: Pipes) -> None:
    worker = pipes.worker()
    pipes.kernel.send(request(2))
    pipes.kernel.send(request(3, protocol.INTERRUPT))
    pipes.requests.take_requests()
    assert received(worker) == [2, 3]
    assert pipes.waiting() == [2]
    pipes.requests.disconnect()
    later = pipes.worker()
    assert received(later) == [2, 3]
    later.send((2).to_bytes(8, "little"))
    pipes.requests.take_answers()
    pipes.requests.disconnect()
    assert received(pipes.worker()) == []


def test_requests_without_an_answer_are_not_remembered(pipes: Pipes) -> None:
    worker = pipes.worker()
    pipes.kernel.send(request(2, protocol.FORGET))
    pipes.kernel.send(request(4, protocol.BATCH_FORGET))
    pipes.kernel.send(b"no request")
    pipes.requests.take_requests()
    assert (received(worker), pipes.waiting()) == ([], [])


def test_worker_that_reads_nothing_blocks_nothing(pipes: Pipes) -> None:
    worker = pipes.worker()
    for unique in range(2, 4002, 2):
        pipes.kernel.send(request(unique))
        pipes.requests.take_requests()
    assert pipes.requests.has_unsent
    seen: list[int] = []
    while pipes.requests.has_unsent:
        seen += received(worker)
        pipes.requests.send()
    assert seen + received(worker) == list(range(2, 4002, 2))


def test_end_of_the_device_is_an_error(pipes: Pipes) -> None:
    read, write = os.pipe()
    os.close(read)
    gone = RememberedRequests(write)
    with pytest.raises(OSError):
        gone.take_requests()
    os.close(write)


@pytest.mark.parametrize("seed", range(20))
def test_every_request_is_answered_however_workers_die(pipes: Pipes, seed: int) -> None:
    rng = random.Random(seed)
    worker, answered, unique = pipes.worker(), set(), 0
    held: list[int] = []
    for _ in range(200):
        match rng.randrange(5):
            case 0 | 1:
                unique += 2
                pipes.kernel.send(request(unique))
            case 2:
                pipes.requests.take_requests()
                held += received(worker)
            case 3 if held:
                done = held.pop(rng.randrange(len(held)))
                answered.add(done)
                worker.send(done.to_bytes(8, "little"))
            case 4 if rng.random() < 0.3:
                pipes.requests.disconnect()
                worker, held = pipes.worker(), []
    pipes.requests.take_requests()
    pipes.requests.take_answers()
    assert sorted(answered | set(pipes.waiting())) == list(range(2, unique + 2, 2))
    assert not answered & set(pipes.waiting())
