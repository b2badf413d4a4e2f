"""Secrets are left out of a command line, and nothing else is."""

from __future__ import annotations

import pytest

from pyqmigrate.vm.qemu.redaction import REDACTED, redact


@pytest.mark.parametrize(
    "word",
    [
        "secret,id=s0,data=hunter2",
        "secret,data=hunter2,id=s0,format=raw",
        "qom-type=secret,id=s0,data=hunter2",
        '{"qom-type":"secret","id":"s0","data":"hunter2"}',
        "port=5900,password=hunter2,addr=127.0.0.1",
        "password=hunter2",
        "file=rbd:pool/image:id=admin:key=hunter2:auth_supported=cephx,format=raw",
        "file=https://me:hunter2@host/disk.img,format=raw",
        "file=iscsi://me%hunter2@host/iqn/0",
        "driver=https,url=https://host/a,cookie=hunter2",
        '{"driver":"https","url":"https://me:hunter2@host/a"}',
        '{"driver":"raw","file":{"driver":"https","cookie":"hunter2","url":"https://host"}}',
        'json:{"driver":"https","password":"hunter2"}',
        "user,id=n,smb.password=hunter2",
        "name=opt/io.systemd.credentials/x,string=a,password=hunter2",
        "type=11,value=io.systemd.credential:passwd.hashed-password.root=hunter2",
        "name=opt/io.systemd.credentials:x,string=hunter2",
        "console=ttyS0 password=hunter2 quiet",
    ],
)
def test_secret_is_left_out(word: str) -> None:
    words, numbers = redact(["qemu", "-x", word])
    assert "hunter2" not in words[2] and REDACTED in words[2]
    assert numbers == (2,)
    assert words[:2] == ("qemu", "-x")


@pytest.mark.parametrize(
    "word",
    [
        ":1,password=on",
        "port=5900,password-secret=s0,disable-ticketing=on",
        "driver=luks,key-secret=s0,file=f",
        '{"driver": "luks", "key-secret": "s0",  "file": "f"}',
        "secret,id=s0,file=/run/secret,format=base64",
        "tls-creds-x509,id=t,dir=/etc/pki,passwordid=s0",
        "virtio-net-pci,netdev=n,mac=52:54:00:12:34:56",
        "l2tpv3,id=n,txcookie=1,rxcookie=2,src=a,dst=b",
        "file=/images/password.img,format=raw",
        "unix:/run/token/qmp,server=on",
        "{not json",
        "-append",
        "root=/dev/vda1 quiet",
    ],
)
def test_word_without_a_secret_stays_as_it_is(word: str) -> None:
    assert redact([word]) == ((word,), ())


def test_text_around_a_secret_stays() -> None:
    words, _ = redact(["file=rbd:pool/image:key=a\\:b:mon_host=h,format=raw"])
    assert words == (f"file=rbd:pool/image:key={REDACTED}:mon_host=h,format=raw",)
    words, _ = redact(["secret,data=a,,b,id=s"])
    assert words == (f"secret,data={REDACTED},id=s",)
