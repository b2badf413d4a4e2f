import array
import os
import resource
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqmigrate.migration.fdset import FdsetError
from pyqmigrate.qmp.descriptors import NamedFds, PendingFds, Receiver


def open_fds():
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield Receiver(ours), theirs


def send(sock, data, count=1):
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    rights = array.array("i", fds)
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    for fd in fds:
        os.close(fd)


def null():
    return os.open("/dev/null", os.O_RDONLY)


def test_text_sent_before_a_descriptor_is_received_alone(pair):
    ours, theirs = pair
    theirs.sendall(b"first")
    theirs.sendall(b" second")
    send(theirs, b"third")
    theirs.sendall(b" fourth")
    assert ours.receive(1000) == (b"first second", [])
    data, fds = ours.receive(1000)
    assert (data, len(fds)) == (b"t", 1)
    assert ours.receive(1000) == (b"hird fourth", [])
    os.close(fds[0])


def test_each_message_keeps_its_own_descriptors(pair):
    ours, theirs = pair
    for data in (b"a", b"bb", b"ccc"):
        send(theirs, data)
    for first, rest in ((b"a", b""), (b"b", b"b"), (b"c", b"cc")):
        data, fds = ours.receive(1000)
        assert (data, len(fds)) == (first, 1)
        os.close(fds[0])
        assert not rest or ours.receive(1000) == (rest, [])


def test_all_descriptors_come_with_the_first_byte_of_their_message(pair):
    ours, theirs = pair
    send(theirs, b"abcdef", 3)
    data, fds = ours.receive(2)
    assert (data, len(fds)) == (b"a", 3)
    assert ours.receive(1000) == (b"bcdef", [])
    for fd in fds:
        os.close(fd)


def test_received_descriptors_are_close_on_exec(pair):
    ours, theirs = pair
    send(theirs, b"x")
    [fd] = ours.receive(10)[1]
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_descriptors_held_back_are_closed_in_the_end(pair):
    receiver, theirs = pair
    theirs.sendall(b"text")
    send(theirs, b"x", 253)
    before = open_fds()
    assert receiver.receive(1000) == (b"text", [])
    receiver.close()
    receiver.close()
    assert open_fds() == before


def test_an_empty_socket_is_distinguished_from_a_closed_one(pair):
    ours, theirs = pair
    with pytest.raises(BlockingIOError):
        ours.receive(10)
    theirs.close()
    assert ours.receive(10) == (b"", [])


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.integers(0, 2)), max_size=8),
    st.integers(1, 64),
)
@settings(deadline=None)
def test_every_descriptor_arrives_at_the_byte_it_was_sent_with(messages, size):
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    text, expected = b"", {}
    with ours, theirs:
        for data, count in messages:
            if count:
                expected[len(text)] = count
                send(theirs, data, count)
            else:
                theirs.sendall(data)
            text += data
        receiver = Receiver(ours)
        received, found = b"", {}
        while len(received) < len(text):
            data, fds = receiver.receive(size)
            assert data
            if fds:
                found[len(received)] = len(fds)
            received += data
            for fd in fds:
                os.close(fd)
    assert received == text
    assert found == expected


def test_only_the_first_descriptor_of_a_message_is_given_out():
    before = open_fds()
    pending = PendingFds()
    fds = [null() for _ in range(3)]
    pending.put(list(fds))
    assert pending.take() == fds[0]
    assert len(open_fds()) == len(before) + 1
    with pytest.raises(FdsetError, match=r"^No file descriptor supplied via SCM_RIGHTS$"):
        pending.take()
    os.close(fds[0])


def test_a_newer_message_replaces_what_was_pending():
    before = open_fds()
    pending = PendingFds()
    pending.put([null(), null()])
    newer = null()
    pending.put([newer])
    pending.put([])
    assert pending.take() == newer
    os.close(newer)
    assert open_fds() == before


def test_closing_closes_what_is_pending():
    before = open_fds()
    pending = PendingFds()
    pending.put([null(), null()])
    pending.close()
    pending.close()
    assert open_fds() == before


def test_pending_descriptors_become_blocking_ones():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    pending = PendingFds()
    pending.put([reader])
    assert os.get_blocking(pending.take())
    os.close(reader)
    os.close(writer)


def test_a_path_descriptor_can_be_pending():
    pending = PendingFds()
    fd = os.open("/dev/null", os.O_PATH)
    pending.put([fd])
    assert pending.take() == fd
    os.close(fd)


def test_a_name_is_used_up_when_it_is_taken():
    names = NamedFds()
    fd = null()
    names.add("x", fd)
    assert names.take("x") == fd
    with pytest.raises(FdsetError, match=r"^File descriptor named 'x' has not been found$"):
        names.take("x")
    os.close(fd)


def test_the_same_name_again_closes_what_it_stood_for():
    before = open_fds()
    names = NamedFds()
    names.add("", null())
    names.add("", null())
    names.close("")
    assert open_fds() == before
    with pytest.raises(FdsetError, match=r"^File descriptor named '' not found$"):
        names.close("")


def test_a_name_that_begins_with_a_digit_is_refused_and_its_descriptor_closed():
    before = open_fds()
    with pytest.raises(FdsetError, match=r"expects a name not starting with a digit$"):
        NamedFds().add("1x", null())
    assert open_fds() == before


def test_close_all_closes_every_name():
    before = open_fds()
    names = NamedFds()
    for name in "abc":
        names.add(name, null())
    names.close_all()
    names.close_all()
    assert open_fds() == before


def test_text_is_kept_when_no_more_descriptors_can_be_opened(pair):
    ours, theirs = pair
    theirs.sendall(b"before")
    send(theirs, b"with")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        assert ours.receive(1000) == (b"beforewith", [])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(BlockingIOError):
        ours.receive(1000)


def test_kernel_fact_that_receiving_rests_on():
    """Without room for descriptors a peek reports them by MSG_CTRUNC, and installs none."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"x")
        assert not ours.recvmsg(10, 0, socket.MSG_PEEK)[2] & socket.MSG_CTRUNC
        send(theirs, b"x")
        before = open_fds()
        assert ours.recvmsg(10, 0, socket.MSG_PEEK)[2] & socket.MSG_CTRUNC
        assert open_fds() == before
