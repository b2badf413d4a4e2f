"""Where can be mounted, what is mounted, and how the kernel is asked."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyqmigrate.errors import NotSupported, TargetError, UsageError
from pyqmigrate.mount import mounting
from pyqmigrate.mount.mounting import check_mount_point, find_mounts, mount, unmount
from tests.harness.unpacked import fusermount


def test_empty_directory_is_taken(tmp_path: Path) -> None:
    check_mount_point(str(tmp_path))


def test_what_is_not_an_empty_directory_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    (tmp_path / "link").symlink_to(directory)
    (directory / ".hidden").touch()
    for name, reason in (
        ("directory", "not empty"),
        ("link", "symbolic link"),
        ("directory/.hidden", "not a directory"),
    ):
        with pytest.raises(UsageError, match=reason):
            check_mount_point(str(tmp_path / name))
    with pytest.raises(TargetError, match="No such file"):
        check_mount_point(str(tmp_path / "missing"))


def test_what_the_mount_uses_itself_must_not_be_on_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "mounted")
    (tmp_path / "mounted").mkdir()
    for used in (tmp_path / "mounted", tmp_path / "link/packs", tmp_path / "mounted/log"):
        with pytest.raises(UsageError, match="is used by the mount"):
            check_mount_point(str(tmp_path / "mounted"), [used])
    check_mount_point(str(tmp_path / "mounted"), [tmp_path / "mounted.log", "/var/cache"])


def test_directory_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(UsageError, match="another user"):
        check_mount_point(str(tmp_path))


@pytest.mark.parametrize("what", ["missing", "file", "directory", "other device", "link"])
def test_without_the_device_of_fuse_nothing_can_be_mounted(
    mount_point: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    device = tmp_path / "fuse"
    if what == "file":
        device.touch()
    elif what == "directory":
        device.mkdir()
    elif what == "link":
        device.symlink_to("none")
    elif what == "other device":
        device = Path("/dev/null")
    monkeypatch.setattr(mounting, "_DEVICE", str(device))
    with pytest.raises(NotSupported, match="this system has no FUSE"):
        mount(str(mount_point), "source", allow_other=False)


def test_mount_is_found_with_its_odd_name_until_it_is_unmounted(mount_point: Path) -> None:
    source = "s3://bucket/pre fix, with\\"
    fd = mount(str(mount_point), source, allow_other=False)
    try:
        (mounted,) = find_mounts(str(mount_point))
        assert (mounted.directory, mounted.source) == (str(mount_point), source)
        assert mounted.uid == os.geteuid()
        with pytest.raises(UsageError, match="mounted already"):
            check_mount_point(str(mount_point))
        unmount(str(mount_point))
        assert find_mounts(str(mount_point)) == []
    finally:
        os.close(fd)


def test_what_is_not_mounted_cannot_be_unmounted(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot unmount"):
        unmount(str(tmp_path))


def test_system_without_fuse_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounting, "_DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(NotSupported, match="no FUSE"):
        mount(str(tmp_path), "store", allow_other=False)


def test_user_without_a_way_to_mount_is_told_the_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotSupported, match=r"user namespace .* fusermount3"):
        mount(str(tmp_path), "store", allow_other=False)


HELPER = """#!{python}
import os, socket, sys
print(*sys.argv[1:], sep="\\n", file=open({log!r}, "w"))
if "bad" in sys.argv[-1]:
    sys.exit("fusermount3: mountpoint is not to its liking")
file = os.open({passed!r}, os.O_RDWR)
link = socket.socket(fileno=int(os.environ["_FUSE_COMMFD"]))
socket.send_fds(link, [b"\\0"], [file])
"""


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of fusermount3, which passes this file, and its log."""
    log, passed, program = tmp_path / "log", tmp_path / "passed", tmp_path / "fusermount3"
    passed.write_bytes(b"the device")
    program.write_text(HELPER.format(python=sys.executable, log=str(log), passed=str(passed)))
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(mounting, "_DEVICE", str(tmp_path / "forbidden"))
    (tmp_path / "forbidden").touch(0)
    opened = os.open

    def without_the_device(path: str, *more: int) -> int:
        if path == str(tmp_path / "forbidden"):  # root could open it
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *more)

    monkeypatch.setattr(os, "open", without_the_device)
    return log


def test_helper_passes_the_descriptor(helper: Path, tmp_path: Path) -> None:
    fd = mount(str(tmp_path / "directory"), "a,b\\c", allow_other=True)
    try:
        assert os.pread(fd, 100, 0) == b"the device"
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
    flag, options, dashes, directory = helper.read_text().splitlines()
    assert (flag, dashes, directory) == ("-o", "--", str(tmp_path / "directory"))
    assert "fsname=a\\,b\\\\c," in options
    assert {"ro", "nosuid", "nodev", "default_permissions", "allow_other"} < set(options.split(","))


def test_what_the_helper_says_is_part_of_the_error(helper: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="not to its liking"):
        mount(str(tmp_path / "bad"), "store", allow_other=False)


def _let_everybody_open_fuse(node: Path) -> None:
    """Put this process into a mount namespace in which /dev/fuse has the mode of distributions."""
    new_namespace = 0x20000
    if ctypes.CDLL(None, use_errno=True).unshare(new_namespace):
        raise OSError(ctypes.get_errno(), "unshare")
    os.mknod(node, 0o20666, os.stat("/dev/fuse").st_rdev)
    node.chmod(0o666)
    for words in (["--make-rprivate", "/"], ["--bind", str(node), "/dev/fuse"]):
        subprocess.run(["mount", *words], check=True)


def test_ordinary_user_mounts_and_unmounts_through_fusermount(
    mount_point: Path, tmp_path: Path
) -> None:
    if os.geteuid():
        pytest.skip("only root can give fusermount3 its setuid bit")
    program = tmp_path / "bin" / "fusermount3"
    program.parent.mkdir()
    shutil.copy(fusermount(), program)
    program.chmod(0o4755)
    for directory in (program.parent, *program.parent.parents):
        if directory.stat().st_mode & 0o001 == 0:
            directory.chmod(directory.stat().st_mode | 0o011)  # of pytest: for its owner only
    os.chown(mount_point, 65534, 65534)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _let_everybody_open_fuse(tmp_path / "fuse")
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.environ["PATH"] = str(program.parent)
            check_mount_point(str(mount_point))
            fd = mount(str(mount_point), "a store, shown", allow_other=False)
            (mounted,) = find_mounts(str(mount_point))
            os.write(write, repr((mounted.source, mounted.uid, os.get_inheritable(fd))).encode())
            unmount(str(mount_point))
            status = len(find_mounts(str(mount_point)))
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as file:
        assert file.read() == "('a store, shown', 65534, False)"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


IN_A_NAMESPACE = """
import os, sys
from pyqmigrate.mount.private import open_private
with open_private(sys.argv[1]) as view:
    name = os.path.basename(sys.argv[1])
    print(os.listdir(view.path), (view.path / name).read_bytes() == open(sys.argv[1], "rb").read())
"""


def test_root_of_a_user_namespace_can_mount(
    mount_point: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        reason = "user namespaces are not available"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    (tmp_path / "guest").write_bytes(os.urandom(1 << 20))
    done = subprocess.run(
        [*namespace, sys.executable, "-c", IN_A_NAMESPACE, str(tmp_path / "guest")],
        capture_output=True,
        text=True,
        timeout=60,
        env=child_environment,
    )
    assert (done.stdout, done.stderr) == ("['guest'] True\n", "")
