import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.migration.fdset import FdInfo, FdsetError, FdSets, fdset_number, is_fdset_name

ANY_FILE = "/dev/null"


def open_fds():
    return len(list(Path("/proc/self/fd").iterdir()))


def is_open(fd):
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


@pytest.fixture
def sets():
    before = open_fds()
    with FdSets() as sets:
        yield sets
    assert open_fds() == before


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


def null():
    return os.open(ANY_FILE, os.O_WRONLY)


def refused(call, *arguments):
    with pytest.raises(FdsetError) as caught:
        call(*arguments)
    return caught.value.errno, str(caught.value)


def test_add_without_id_fills_the_lowest_hole(sets):
    for fdset_id in (0, 1, 3, 5):
        sets.add(null(), fdset_id)
    assert [sets.add(null()).fdset_id for _ in range(3)] == [2, 4, 6]


def test_add_returns_the_set_and_the_number_given(sets):
    fd = null()
    assert sets.add(fd, 7) == (7, fd)


def test_add_to_an_existing_set_appends(sets):
    first, second = sets.add(null(), 1), sets.add(null(), 1)
    assert sets.query() == [(1, (FdInfo(first.fd), FdInfo(second.fd)))]


def test_ids_go_up_to_the_largest_signed_64_bit_number(sets):
    assert sets.add(null(), 2**63 - 1).fdset_id == 2**63 - 1


@pytest.mark.parametrize("fdset_id", [-1, 2**63])
def test_an_id_outside_64_bits_is_refused_and_the_descriptor_stays_the_callers(sets, fdset_id):
    fd = null()
    assert refused(sets.add, fd, fdset_id) == (
        errno.EINVAL,
        "Parameter 'fdset-id' expects a non-negative value",
    )
    assert is_open(fd)
    os.close(fd)


def test_a_descriptor_can_be_owned_once_only(sets):
    fd = sets.add(null(), 4).fd
    assert refused(sets.add, fd) == (errno.EEXIST, f"fd {fd} already belongs to fdset 4")


def test_a_number_that_is_not_open_is_refused_and_makes_no_set(sets):
    fd = null()
    os.close(fd)
    assert refused(sets.add, fd)[0] == errno.EBADF
    assert sets.query() == []


def test_an_added_descriptor_becomes_close_on_exec(sets):
    fd = null()
    os.set_inheritable(fd, True)
    sets.add(fd)
    assert not os.get_inheritable(fd)


def test_opaque_is_kept_and_an_empty_one_differs_from_none(sets):
    sets.add(null(), 1, "")
    sets.add(null(), 1)
    assert [fd.opaque for fd in sets.query()[0].fds] == ["", None]


def test_query_lists_highest_id_first_and_members_in_order_of_addition(sets):
    added = [sets.add(null(), fdset_id).fd for fdset_id in (2, 9, 2, 5)]
    assert [(s.fdset_id, [m.fd for m in s.fds]) for s in sets.query()] == [
        (9, [added[1]]),
        (5, [added[3]]),
        (2, [added[0], added[2]]),
    ]


def test_remove_one_member_closes_it_at_once_and_keeps_the_others(sets):
    first, second = sets.add(null(), 1).fd, sets.add(null(), 1).fd
    sets.remove(1, first)
    assert not is_open(first)
    assert sets.query() == [(1, (FdInfo(second),))]


def test_a_set_vanishes_with_its_last_member(sets):
    fd = sets.add(null(), 1).fd
    sets.remove(1, fd)
    assert sets.query() == []


def test_remove_without_a_member_closes_all(sets):
    fds = [sets.add(null(), 1).fd for _ in range(3)]
    sets.remove(1)
    assert not any(map(is_open, fds))
    assert sets.query() == []


def test_remove_of_what_is_not_there_says_so_in_qemus_words(sets):
    sets.add(null(), 1)
    enoent = errno.ENOENT
    assert refused(sets.remove, 9) == (enoent, "File descriptor named 'fdset-id:9' not found")
    assert refused(sets.remove, -1) == (enoent, "File descriptor named 'fdset-id:-1' not found")
    assert refused(sets.remove, 1, 99) == (
        enoent,
        "File descriptor named 'fdset-id:1, fd:99' not found",
    )


def test_a_removed_set_lives_on_empty_until_its_last_loan_ends(sets):
    sets.add(null(), 1)
    with sets.open("/dev/fdset/1", os.O_WRONLY), sets.open("/dev/fdset/1", os.O_WRONLY) as last:
        sets.remove(1)
        assert sets.query() == [(1, ())]
        sets.remove(1)  # nothing to do, and no error
        assert refused(sets.remove, 1, 5)[0] == errno.ENOENT
    assert last.closed
    assert sets.query() == []


def test_an_emptied_set_can_be_filled_again(sets):
    sets.add(null(), 1)
    with sets.open("/dev/fdset/1", os.O_WRONLY):
        sets.remove(1)
        fd = sets.add(null(), 1).fd
    assert sets.query() == [(1, (FdInfo(fd),))]


def test_an_emptied_set_keeps_its_id_taken(sets):
    sets.add(null(), 0)
    with sets.open("/dev/fdset/0", os.O_WRONLY):
        sets.remove(0)
        assert sets.add(null()).fdset_id == 1


def test_removing_members_does_not_disturb_a_loan(sets, path):
    sets.add(os.open(path, os.O_WRONLY), 1)
    with sets.open("/dev/fdset/1", os.O_WRONLY) as file:
        sets.remove(1)
        os.pwrite(file.fileno(), b"CON", 0)
    assert path.read_bytes() == b"CONtent"


def test_open_gives_a_close_on_exec_duplicate(sets):
    fd = sets.add(null(), 1).fd
    with sets.open("/dev/fdset/1", os.O_WRONLY) as file:
        assert file.fileno() != fd
        assert not os.get_inheritable(file.fileno())


def test_closing_a_loan_twice_is_harmless(sets):
    sets.add(null(), 1)
    file = sets.open("/dev/fdset/1", os.O_WRONLY)
    file.close()
    reused = null()
    file.close()
    assert is_open(reused)
    os.close(reused)
    with pytest.raises(ValueError, match="/dev/fdset/1 is closed"):
        file.fileno()


MODES = [os.O_RDONLY, os.O_WRONLY, os.O_RDWR]


@pytest.mark.parametrize("direct", [0, os.O_DIRECT])
@pytest.mark.parametrize("mode", MODES)
def test_access_mode_and_o_direct_must_match_exactly(sets, path, mode, direct):
    for flags in {m | d for m in MODES for d in (0, os.O_DIRECT)} - {mode | direct}:
        sets.add(os.open(path, flags), 1)
    assert refused(sets.open, "/dev/fdset/1", mode | direct | os.O_CLOEXEC) == (
        errno.EACCES,
        f"Failed to find file descriptor with matching flags={mode | direct:#x}",
    )
    sets.add(os.open(path, mode | direct), 1)
    with sets.open("/dev/fdset/1", mode | direct) as file:
        flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
    assert flags & (os.O_ACCMODE | os.O_DIRECT) == mode | direct


def test_refused_flags_are_shown_as_asked_for(sets, path):
    sets.add(os.open(path, os.O_RDONLY), 1)
    asked = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    assert refused(sets.open, "/dev/fdset/1", asked)[1].endswith("matching flags=0x41")
    assert refused(sets.open, "/dev/fdset/1", asked | os.O_DIRECT)[1].endswith("flags=0x4041")


def test_newest_matching_member_wins(sets, tmp_path):
    for name in ("old", "new"):
        sets.add(os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT), 1)
    with sets.open("/dev/fdset/1", os.O_WRONLY) as file:
        os.write(file.fileno(), b"x")
    assert (tmp_path / "old").read_bytes() == b""
    assert (tmp_path / "new").read_bytes() == b"x"


@pytest.mark.parametrize("member", [os.O_SYNC, os.O_DSYNC])
def test_a_synchronous_member_never_serves_and_leaks_nothing(sets, path, member):
    fd = sets.add(os.open(path, os.O_WRONLY | member), 1).fd
    before = open_fds()
    assert refused(sets.open, "/dev/fdset/1", os.O_WRONLY) == (
        errno.EINVAL,
        f"Failed to dup() given file descriptor fd={fd}",
    )
    assert open_fds() == before


def test_a_synchronous_request_is_served_by_a_synchronous_member(sets, path):
    sets.add(os.open(path, os.O_WRONLY | os.O_SYNC), 1)
    with sets.open("/dev/fdset/1", os.O_WRONLY | os.O_SYNC):
        pass


def test_open_clears_o_append_on_the_members_description(sets, path):
    fd = sets.add(os.open(path, os.O_WRONLY | os.O_APPEND), 1).fd
    with sets.open("/dev/fdset/1", os.O_WRONLY):
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND


def test_open_sets_the_status_flags_asked_for(sets, path):
    sets.add(os.open(path, os.O_RDONLY), 1)
    with sets.open("/dev/fdset/1", os.O_RDONLY | os.O_NONBLOCK) as file:
        assert not os.get_blocking(file.fileno())


@pytest.mark.parametrize(
    ("flags", "left"),
    [(0, b"content"), (os.O_CREAT, b"content"), (os.O_TRUNC, b""), (os.O_CREAT | os.O_EXCL, b"")],
)
def test_only_truncating_and_exclusive_opens_empty_the_file(sets, path, flags, left):
    sets.add(os.open(path, os.O_WRONLY), 1)
    with sets.open("/dev/fdset/1", os.O_WRONLY | flags):
        assert path.read_bytes() == left


def test_the_position_is_the_members(sets, path):
    fd = sets.add(os.open(path, os.O_RDONLY), 1).fd
    os.lseek(fd, 3, os.SEEK_SET)
    with sets.open("/dev/fdset/1", os.O_RDONLY) as file:
        assert os.read(file.fileno(), 4) == b"tent"


def test_a_set_that_is_not_there_is_named(sets):
    assert refused(sets.open, "/dev/fdset/077", os.O_WRONLY) == (
        errno.ENOENT,
        "Failed to find fdset /dev/fdset/77",
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("2147483647", 2**31 - 1),
        ("+1", 1),
        (" 1", 1),
        ("01", 1),
        ("-0", 0),
        ("0" * 9000 + "7", 7),
    ],
)
def test_number_of_a_name_is_read_as_qemu_reads_it(text, number):
    assert fdset_number(f"/dev/fdset/{text}") == number


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "1x", "0x1", "2147483648", "99999999999", "1 ", "1/", "/1", "1.0", "9" * 9000],
)
def test_a_name_without_a_number_is_refused_in_qemus_words(text):
    assert refused(fdset_number, f"/dev/fdset/{text}") == (
        errno.EINVAL,
        f"Could not parse fdset /dev/fdset/{text}",
    )


def test_only_the_exact_prefix_is_a_fdset_name():
    assert is_fdset_name("/dev/fdset/1")
    assert not is_fdset_name("//dev/fdset/1")
    assert not is_fdset_name("/dev/fdset")


def test_sets_above_int_max_can_be_made_but_not_opened(sets):
    sets.add(null(), 2**31)
    assert refused(sets.open, f"/dev/fdset/{2**31}", os.O_WRONLY)[0] == errno.EINVAL


def test_close_closes_members_and_leaves_loans_to_their_holders(path):
    sets = FdSets()
    fd = sets.add(os.open(path, os.O_RDONLY), 1).fd
    file = sets.open("/dev/fdset/1", os.O_RDONLY)
    sets.close()
    sets.close()
    assert not is_open(fd)
    assert os.read(file.fileno(), 7) == b"content"
    file.close()
    assert sets.query() == []


def test_nothing_can_be_added_after_close():
    sets = FdSets()
    sets.close()
    fd = null()
    assert refused(sets.add, fd) == (errno.EINVAL, "these fdsets are closed")
    os.close(fd)


def test_errors_are_of_the_package_and_of_the_system(sets):
    with pytest.raises(PyqmigrateError) as caught:
        sets.remove(1)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.ENOENT


def test_threads_adding_opening_and_removing_lose_and_leak_nothing(sets):
    failures = []

    def work():
        try:
            for _ in range(200):
                fdset_id, fd = sets.add(null())
                with sets.open(f"/dev/fdset/{fdset_id}", os.O_WRONLY):
                    sets.remove(fdset_id, fd)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sets.query() == []


class AnyOrderOfCalls(RuleBasedStateMachine):
    """A plain dict of lists is the twin; the count of open descriptors is checked throughout."""

    added = Bundle("added")
    loans = Bundle("loans")

    def __init__(self):
        super().__init__()
        self.before = open_fds()
        self.sets = FdSets()
        self.members = {}
        self.borrowed = {}
        self.taken = []

    def forget_unused(self, fdset_id):
        if not self.members[fdset_id] and not self.borrowed.get(fdset_id):
            del self.members[fdset_id]

    @rule(target=added, fdset_id=st.none() | st.integers(0, 3))
    def add(self, fdset_id):
        result = self.sets.add(null(), fdset_id)
        if fdset_id is None:
            assert result.fdset_id not in self.members
            assert set(range(result.fdset_id)) <= set(self.members)
        self.members.setdefault(result.fdset_id, []).append(result.fd)
        return result

    @rule(result=consumes(added))
    def remove_one(self, result):
        if result.fd in self.members.get(result.fdset_id, []):
            self.sets.remove(*result)
            self.members[result.fdset_id].remove(result.fd)
            self.forget_unused(result.fdset_id)
        else:
            assert refused(self.sets.remove, *result)[0] == errno.ENOENT

    @rule(fdset_id=st.integers(0, 4))
    def remove_all(self, fdset_id):
        if fdset_id in self.members:
            self.sets.remove(fdset_id)
            self.members[fdset_id] = []
            self.forget_unused(fdset_id)
        else:
            assert refused(self.sets.remove, fdset_id)[0] == errno.ENOENT

    @rule(target=loans, fdset_id=st.integers(0, 4))
    def borrow(self, fdset_id):
        if not self.members.get(fdset_id):
            assert refused(self.sets.open, f"/dev/fdset/{fdset_id}", os.O_WRONLY)[0] in (
                errno.ENOENT,
                errno.EACCES,
            )
            return None
        self.borrowed[fdset_id] = self.borrowed.get(fdset_id, 0) + 1
        self.taken.append(self.sets.open(f"/dev/fdset/{fdset_id}", os.O_WRONLY))
        return self.taken[-1]

    @rule(loan=consumes(loans))
    def give_back(self, loan):
        if loan is not None:
            loan.close()
            self.borrowed[loan.fdset_id] -= 1
            self.forget_unused(loan.fdset_id)

    @invariant()
    def query_shows_the_twin(self):
        shown = [(s.fdset_id, [m.fd for m in s.fds]) for s in self.sets.query()]
        assert shown == sorted(self.members.items(), reverse=True)

    @invariant()
    def every_descriptor_is_accounted_for(self):
        held = sum(map(len, self.members.values())) + sum(self.borrowed.values())
        assert open_fds() == self.before + held

    def teardown(self):
        self.sets.close()
        for loan in self.taken:
            loan.close()
        assert self.sets.query() == []
        assert open_fds() == self.before


TestAnyOrderOfCalls = AnyOrderOfCalls.TestCase
TestAnyOrderOfCalls.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
