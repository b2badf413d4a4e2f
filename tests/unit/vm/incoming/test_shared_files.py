"""Which files and servers a QEMU writes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyqmigrate.vm.incoming.shared_files import written_files
from pyqmigrate.vm.qemu.command_line import CommandLine


def written(*words: str) -> list[str]:
    return sorted(written_files(CommandLine.parse(["qemu", *words])))


@pytest.mark.parametrize(
    "words",
    [
        ["-drive", "file=/d,if=virtio"],
        ["-drive", "file.filename=/d,file.driver=file,driver=raw"],
        ["-drive", "file=file:/d"],
        ["-hda", "/d"],
        ["/d"],
        ["-pflash", "/d"],
        ["-blockdev", "driver=file,node-name=a,filename=/d"],
        ["-blockdev", '{"driver":"qcow2","file":{"driver":"file","filename":"/d"}}'],
        ["-blockdev", "file,node-name=a,filename=/d", "-blockdev", "raw,node-name=b,file=a"],
        ["-object", "memory-backend-file,id=m,size=1M,mem-path=/d,share=on"],
        ["-qmp", "unix:/d,server=on,wait=off"],
        ["-monitor", "unix:/d,server,nowait"],
        ["-chardev", "socket,id=c,path=/d,server=on"],
        ["-vnc", "unix:/d"],
        ["-serial", "file:/d"],
        ["-serial", "mon:unix:/d,server=on"],
        ["-debugcon", "file:/d"],
        ["-chardev", "file,id=c,path=/d"],
        ["-chardev", "pipe,id=c,path=/d"],
        ["-chardev", "null,id=c,logfile=/d"],
        ["-pidfile", "/d"],
        ["-D", "/d"],
        ["-trace", "enable=x,file=/d"],
        ["-object", "filter-dump,id=f,netdev=n,file=/d"],
        ["-drive", "driver=qcow2,file.driver=raw,file.file.filename=/d"],
        ["-drive", "if=none,file.file.filename=/d,format=raw"],
        [
            "-blockdev",
            '{"driver":"qcow2","node-name":"n","file":{"driver":"raw","file":'
            '{"driver":"file","filename":"/d"}},"backing":{"driver":"file","filename":"/base"}}',
        ],
        ["-blockdev", '{"driver":"quorum","children":[{"driver":"file","filename":"/d"}]}'],
        ["-drive", 'file=json:{"driver":"raw",,"file":{"driver":"file",,"filename":"/d"}}'],
        ["-drive", 'if=none,file=json:{"driver":"file","filename":"/d"},format=raw'],
        ["-hda", 'json:{"driver":"raw","file":{"driver":"file","filename":"/d"}}'],
    ],
    ids=" ".join,
)
def test_file_that_is_written_is_found(words: list[str]) -> None:
    assert written(*words) == ["/d"]


@pytest.mark.parametrize(
    "words",
    [
        ["-drive", "file=/d,readonly=on"],
        ["-drive", "file=/d,media=cdrom"],
        ["-drive", "file=/d,snapshot=on"],
        ["-snapshot", "-drive", "file=/d", "-hda", "/d"],
        ["-cdrom", "/d"],
        ["-blockdev", "driver=file,node-name=a,filename=/d,read-only=on"],
        [
            "-blockdev",
            "file,node-name=a,filename=/d",
            "-blockdev",
            "raw,node-name=b,file=a,read-only=on",
        ],
        ["-object", "memory-backend-file,id=m,size=1M,mem-path=/d,share=off"],
        ["-object", "memory-backend-file,id=m,size=1M,mem-path=/d,share=on,readonly=on"],
        ["-chardev", "socket,id=c,path=/d"],
        ["-serial", "tcp::4444,server"],
        ["-serial", "file:/dev/null"],
        ["-object", "memory-backend-file,id=m,size=1M,mem-path=/tmp,share=on"],
        ["-blockdev", '{"driver":"raw","file":{"driver":"file","filename":"/d","read-only":true}}'],
        ["-blockdev", '{"driver":"nbd","server":{"type":"unix","path":"/s"},"read-only":true}'],
        ["-drive", "if=none,id=d"],
    ],
    ids=" ".join,
)
def test_file_that_is_only_read_is_not(words: list[str]) -> None:
    assert written(*words) == []


def test_backing_file_of_an_overlay_is_only_read() -> None:
    found = written(
        "-blockdev",
        "file,node-name=base,filename=/base",
        "-blockdev",
        "file,node-name=top,filename=/top",
        "-blockdev",
        "qcow2,node-name=disk,file=top,backing=base",
    )
    assert found == ["/top"]


def test_file_has_one_name_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    (tmp_path / "link").symlink_to("disk")
    assert written("-hda", str(tmp_path / "link")) == [str(tmp_path / "disk")]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('file=json:{"driver":"raw","file":"/a"}', 'file=json:{"driver":"raw","file":"/b"}'),
        ('file=json:{"driver":"raw","x', 'file=json:{"driver":"raw","y'),
        ("file.driver=nbd,file.host=h,file.port=1", "file.driver=nbd,file.host=h,file.port=2"),
        ("file.driver=ssh,file.host=h,file.path=/a", "file.driver=ssh,file.host=h,file.path=/b"),
    ],
)
def test_different_disks_are_different(one: str, other: str) -> None:
    assert written("-drive", one) == written("-drive", one) != written("-drive", other)
    assert len(written("-drive", one)) == 1


def test_node_on_a_server_is_the_same_by_any_name() -> None:
    node = '{"driver":"nbd","node-name":"%s","export":"e","server":{"type":"inet","host":"h"}}'
    assert len(written("-blockdev", node % "a")) == 1
    assert written("-blockdev", node % "a") == written("-blockdev", node % "b")


def test_backing_file_inside_a_node_is_only_read() -> None:
    found = written(
        "-blockdev",
        "file,node-name=base,filename=/base",
        "-blockdev",
        '{"driver":"qcow2","file":{"driver":"file","filename":"/top"},'
        '"backing":{"driver":"qcow2","file":"base"}}',
    )
    assert found == ["/top"]


def test_disk_on_the_network_is_known_by_its_address() -> None:
    assert written("-drive", "file=nbd://host:10809/export") == ["nbd://host:10809/export"]
