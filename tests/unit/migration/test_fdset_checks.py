import errno
import fcntl
import os
import re

import pytest

from pyqmigrate.migration import fdset_checks as fdset_rules
from pyqmigrate.migration.fdset import FdsetError, FdSets
from pyqmigrate.migration.fdset_checks import (
    Direction,
    check_fdset,
    describe_fdset,
    same_description,
)

W, R, RW, D = os.O_WRONLY, os.O_RDONLY, os.O_RDWR, os.O_DIRECT
NAME = "/dev/fdset/1"


@pytest.fixture
def sets():
    with FdSets() as sets:
        yield sets


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "guest"
    path.write_bytes(bytes(8192))
    return path


def fill(sets, path, *flags):
    return [sets.add(os.open(path, each), 1).fd for each in flags]


def complaint(sets, direction=Direction.SAVE, *, direct_io=False, offset=0):
    with pytest.raises(FdsetError) as caught:
        check_fdset(sets, NAME, direction, direct_io=direct_io, offset=offset)
    text = str(caught.value)
    assert text.startswith(NAME + ": ")
    return text.removeprefix(NAME + ": ")


@pytest.mark.parametrize(
    ("direction", "flags", "direct_io"),
    [
        (Direction.SAVE, [W], False),
        (Direction.SAVE, [W, W], False),
        (Direction.SAVE, [W, W | D], True),
        (Direction.SAVE, [W | D, W], True),
        (Direction.SAVE, [W, W | D], False),
        (Direction.SAVE, [R, W, R | D, W | D], True),
        (Direction.SAVE, [W | os.O_APPEND], False),
        (Direction.LOAD, [R], False),
        (Direction.LOAD, [R, R | D, R], True),
        (Direction.LOAD, [W, R], False),
    ],
)
def test_a_set_that_serves_passes(sets, path, direction, flags, direct_io):
    fill(sets, path, *flags)
    check_fdset(sets, NAME, direction, direct_io=direct_io, offset=0)


@pytest.mark.parametrize(
    ("direction", "flags", "direct_io", "advice"),
    [
        (Direction.SAVE, [W], True, "no O_DIRECT member for a save; add open(file, O_WRONLY|O_D"),
        (Direction.LOAD, [R], True, "no O_DIRECT member for a load; add open(file, O_RDONLY|O_D"),
        (Direction.SAVE, [W | D], True, "no plain (not O_DIRECT) member for a save; add open(file"),
        (Direction.SAVE, [W | D], False, "no plain (not O_DIRECT) member for a save"),
        (Direction.SAVE, [R], False, "no plain (not O_DIRECT) member for a save; add open(file"),
        (Direction.LOAD, [W], False, "member for a load; add open(file, O_RDONLY)"),
    ],
)
def test_a_missing_member_is_named_with_the_open_that_makes_it(
    sets, path, direction, flags, direct_io, advice
):
    fill(sets, path, *flags)
    assert advice in complaint(sets, direction, direct_io=direct_io)


def test_a_missing_member_is_an_access_error_that_lists_what_there_is(sets, path):
    [fd] = fill(sets, path, R)
    assert complaint(sets).endswith(f"it holds fd {fd}: O_RDONLY")
    with pytest.raises(FdsetError) as caught:
        check_fdset(sets, NAME, Direction.SAVE, direct_io=False, offset=0)
    assert caught.value.errno == errno.EACCES


def test_a_read_write_member_is_refused_even_beside_one_that_serves(sets, path):
    fd, _ = fill(sets, path, RW, W)
    assert complaint(sets) == (
        f"fd {fd}: O_RDWR; access modes must match exactly: open with open(file, O_WRONLY)"
    )


@pytest.mark.parametrize(("flag", "word"), [(os.O_SYNC, "O_SYNC"), (os.O_DSYNC, "O_DSYNC")])
def test_a_synchronous_member_is_refused(sets, path, flag, word):
    [fd] = fill(sets, path, W | flag)
    assert complaint(sets) == (
        f"fd {fd}: O_WRONLY|{word}; open without O_SYNC and O_DSYNC, and fsync after the migration"
    )


def test_members_of_different_files_are_refused(sets, path, tmp_path):
    [first] = fill(sets, path, W)
    second = sets.add(os.open(tmp_path / "other", W | os.O_CREAT), 1).fd
    assert f"fd {first} and fd {second} are different files" in complaint(sets)


def test_two_names_of_one_file_pass(sets, path, tmp_path):
    os.link(path, tmp_path / "link")
    fill(sets, path, W)
    fill(sets, tmp_path / "link", W | D)
    check_fdset(sets, NAME, Direction.SAVE, direct_io=True, offset=0)


def test_a_dup_pair_is_distinguished_from_two_opens(sets, path):
    [first] = fill(sets, path, W)
    second = sets.add(os.dup(first), 1).fd
    fcntl.fcntl(second, fcntl.F_SETFL, D)
    text = complaint(sets, direct_io=True)
    assert f"fd {first} and fd {second} are dup()s of one open file description" in text
    assert "open(file, O_WRONLY), and open(file, O_WRONLY|O_DIRECT)" in text


def test_a_dup_pair_serves_where_one_member_is_enough(sets, path):
    [first] = fill(sets, path, W)
    sets.add(os.dup(first), 1)
    check_fdset(sets, NAME, Direction.SAVE, direct_io=False, offset=0)


def test_a_position_is_refused_without_an_offset(sets, path):
    [fd] = fill(sets, path, W)
    os.lseek(fd, 4096, os.SEEK_SET)
    text = complaint(sets)
    assert re.search(rf"fd {fd} is at position 0x1000.*rewind it.*or give offset=0x1000", text)
    check_fdset(sets, NAME, Direction.SAVE, direct_io=False, offset=4096)


def test_only_the_member_that_would_be_used_must_be_at_zero(sets, path):
    old, _ = fill(sets, path, W, W)
    os.lseek(old, 4096, os.SEEK_SET)
    check_fdset(sets, NAME, Direction.SAVE, direct_io=False, offset=0)


@pytest.mark.parametrize("other", ["/dev/null", "/"])
def test_something_that_is_not_a_regular_file_is_refused(sets, other):
    fd = sets.add(os.open(other, R), 1).fd
    assert complaint(sets, Direction.LOAD) == (
        f"fd {fd} is not a regular file; hand in one that is"
    )


def test_a_pipe_is_refused_though_it_has_no_position(sets):
    reader, writer = os.pipe()
    sets.add(writer, 1)
    assert "is not a regular file" in complaint(sets)
    os.close(reader)


def test_a_set_emptied_while_on_loan_is_refused(sets, path):
    fill(sets, path, W)
    with sets.open(NAME, W):
        sets.remove(1)
        assert complaint(sets).endswith("add open(file, O_WRONLY)")


def test_a_missing_set_is_reported_as_the_open_would(sets):
    with pytest.raises(FdsetError, match=r"^Failed to find fdset /dev/fdset/1$"):
        check_fdset(sets, NAME, Direction.SAVE, direct_io=False, offset=0)


def test_checking_changes_no_flag_and_no_position(sets, path):
    fds = fill(sets, path, W | os.O_APPEND, W | D)
    os.lseek(fds[0], 5, os.SEEK_SET)
    before = [(fcntl.fcntl(fd, fcntl.F_GETFL), os.lseek(fd, 0, os.SEEK_CUR)) for fd in fds]
    check_fdset(sets, NAME, Direction.SAVE, direct_io=True, offset=1)
    after = [(fcntl.fcntl(fd, fcntl.F_GETFL), os.lseek(fd, 0, os.SEEK_CUR)) for fd in fds]
    assert after == before


def test_description_shows_what_the_kernel_knows(sets, path):
    sets.add(os.open(path, W | D), 1, "wr:direct")
    [member] = describe_fdset(sets, NAME)
    assert (member.access, member.direct, member.sync) == (W, True, False)
    assert (member.size, member.position, member.inode) == (8192, 0, path.stat().st_ino)
    assert str(member) == f"fd {member.fd} (wr:direct): O_WRONLY|O_DIRECT"


def test_description_lists_the_newest_member_first(sets, path):
    fds = fill(sets, path, W, R)
    assert [member.fd for member in describe_fdset(sets, NAME)] == fds[::-1]


@pytest.fixture(params=["kcmp", "toggle"])
def way(request, monkeypatch):
    """Both ways of telling descriptions apart give the same answers."""
    if request.param == "toggle":
        monkeypatch.setattr(fdset_rules, "_SYS_KCMP", {})


@pytest.mark.usefixtures("way")
def test_a_dup_shares_the_description_and_a_second_open_does_not(path):
    first, second = os.open(path, R), os.open(path, R)
    copy = os.dup(first)
    flags = fcntl.fcntl(first, fcntl.F_GETFL)
    try:
        assert same_description(first, copy)
        assert not same_description(first, second)
        assert fcntl.fcntl(first, fcntl.F_GETFL) == flags
    finally:
        for fd in (first, second, copy):
            os.close(fd)


@pytest.mark.usefixtures("way")
def test_descriptions_with_different_flags_differ(path):
    first, second = os.open(path, R), os.open(path, R | D)
    try:
        assert not same_description(first, second)
    finally:
        os.close(first)
        os.close(second)


@pytest.mark.usefixtures("way")
def test_comparing_a_closed_descriptor_is_an_error(path):
    fd = os.open(path, R)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        same_description(fd, fd)
