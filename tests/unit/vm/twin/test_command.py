"""A twin has the same devices and nothing of the host."""

from __future__ import annotations

import json
import shlex

import pytest

from pyqmigrate.errors import NotSupported
from pyqmigrate.vm.qemu.command_line import CommandLine, Option
from pyqmigrate.vm.twin.command import Twin, make_twin

BLOCKS = {"pc.ram": 64 << 20, "vga.vram": 16 << 20, "/rom@etc/acpi/tables": 1 << 17}
NULL = "driver=null-co,size=1073741824,read-zeroes=on"
ALWAYS = ["-display none", "-monitor none", "-S", "-incoming defer"]
SIZES = {"/disk.qcow2": 3 << 30, "d0": 4096, "node0": 8192}


def twin(text: str) -> Twin:
    return make_twin(
        CommandLine.parse(["qemu-system-x86_64", *shlex.split(text)]),
        BLOCKS,
        SIZES.get,
        lambda length: f"/proc/self/fd/{length}",
    )


def made(text: str) -> list[str]:
    """The options that stand in for those of ``text``, memory and what is always there left out."""
    command = twin(f"-machine memory-backend=m {text}").command
    options = [str(option) for option in command.options]
    assert options[0] == "-machine memory-backend=m"
    assert options[-4:] == ALWAYS
    return options[1:-4]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "-drive file=/disk.qcow2,if=virtio,format=qcow2,cache=none,aio=native",
            "-drive if=virtio,driver=null-co,size=3221225472,read-zeroes=on",
        ),
        (
            "-drive file=/x,,y,id=d0,if=none,throttling.bps-total=1",
            "-drive if=none,id=d0,driver=null-co,size=4096,read-zeroes=on",
        ),
        ("-drive if=none,id=cd,media=cdrom", "-drive if=none,media=cdrom,id=cd"),
        ("-drive file=/x", f"-drive {NULL}"),
        (
            "-drive if=pflash,unit=0,readonly=on,format=raw,file=/fw",
            f"-drive if=pflash,unit=0,readonly=on,{NULL}",
        ),
        ("-drive driver=nbd,server.type=unix,server.path=/s,if=ide", f"-drive if=ide,{NULL}"),
        (
            "-drive file=rbd:pool/image,if=scsi,index=2,bus=0,unit=1",
            f"-drive if=scsi,index=2,bus=0,unit=1,{NULL}",
        ),
        (
            "-hda /disk.qcow2",
            "-drive index=0,media=disk,driver=null-co,size=3221225472,read-zeroes=on",
        ),
        ("-hdd /x", f"-drive index=3,media=disk,{NULL}"),
        ("-cdrom /x", f"-drive index=2,media=cdrom,{NULL}"),
        ("-fdb /x", f"-drive if=floppy,index=1,{NULL}"),
        ("-sd /x", f"-drive if=sd,{NULL}"),
        ("-pflash /x", f"-drive if=pflash,{NULL}"),
        ("/disk.qcow2", "-drive index=0,media=disk,driver=null-co,size=3221225472,read-zeroes=on"),
        (
            "-blockdev driver=file,filename=/x,node-name=node0",
            "-blockdev driver=null-co,size=8192,read-zeroes=on,node-name=node0",
        ),
        (
            '-blockdev \'{"driver":"qcow2","node-name":"q","read-only":true,"file":{"driver":"file",'
            '"filename":"/disk.qcow2"}}\'',
            "-blockdev driver=null-co,size=3221225472,read-zeroes=on,node-name=q,read-only=on",
        ),
        ("-chardev socket,id=c0,path=/s,server=on,wait=off,logfile=/log", "-chardev null,id=c0"),
        ("-chardev pty,id=c1", "-chardev null,id=c1"),
        ('-chardev \'{"id":"c2","backend":{"type":"stdio","data":{}}}\'', "-chardev null,id=c2"),
        ("-serial mon:stdio", "-serial null"),
        ("-serial tcp::4444,server=on", "-serial null"),
        ("-serial none", "-serial none"),
        ("-serial chardev:c0", "-serial chardev:c0"),
        ("-parallel /dev/parport0", "-parallel null"),
        ("-debugcon file:/log", "-debugcon null"),
        ("-audiodev pa,id=a,server=/run/pulse", "-audiodev none,id=a"),
        ("-audio pa,model=hda,server=x", "-audio none,model=hda"),
        ("-fsdev local,id=f,path=/,security_model=none", "-fsdev synth,id=f"),
        ("-virtfs local,path=/,mount_tag=t,security_model=none", "-virtfs synth,mount_tag=t"),
        (
            "-netdev user,id=n,hostfwd=tcp::22-:22,net=10.0.3.0/24,tftp=/t,smb=/s",
            "-netdev user,id=n,net=10.0.3.0/24,restrict=on",
        ),
        (
            "-netdev tap,id=n,fd=25,vhost=on,vhostfd=26",
            "-netdev tap,id=n,script=no,downscript=no,vhost=off",
        ),
        (
            "-netdev tap,id=n,fds=25:26:27,vnet_hdr=off",
            "-netdev tap,id=n,queues=3,script=no,downscript=no,vhost=off,vnet_hdr=off",
        ),
        ("-netdev bridge,id=n,br=virbr0", "-netdev tap,id=n,script=no,downscript=no,vhost=off"),
        ("-netdev socket,id=n,listen=:1234", "-netdev hubport,id=n,hubid=65537"),
        (
            "-nic user,model=e1000,mac=52:54:00:00:00:01,hostfwd=tcp::22-:22",
            "-nic user,model=e1000,mac=52:54:00:00:00:01,restrict=on",
        ),
        (
            "-nic tap,model=virtio,ifname=tap0",
            "-nic tap,model=virtio,script=no,downscript=no,vhost=off",
        ),
        ("-nic none", "-nic none"),
        ("-net nic,model=rtl8139", "-net nic,model=rtl8139"),
        ("-object rng-random,id=r,filename=/dev/hwrng", "-object rng-builtin,id=r"),
        ("-object iothread,id=t", "-object iothread,id=t"),
        ("-device virtio-blk-pci,drive=d0", "-device virtio-blk-pci,drive=d0"),
        ("-usbdevice tablet", "-usbdevice tablet"),
        ("-icount shift=3,sleep=off", "-icount shift=3,sleep=off"),
        ("-cpu host -smp 4 -vga qxl", "-cpu host|-smp 4|-vga qxl"),
        ("-M q35,dumpdtb=/x,nvdimm=on", "-machine q35,nvdimm=on"),
        (
            "-global driver=PIIX4_PM,property=disable_s3,value=1",
            "-global driver=PIIX4_PM,property=disable_s3,value=1",
        ),
        ("-readconfig /proc/self/fd/11", ""),
        (
            "-qmp unix:/q,server=on -mon c0 -monitor stdio -pidfile /p -daemonize -D /log -d int "
            "-trace file=/t -plugin /x.so -spice port=1 -vnc :1 -gdb tcp::1 -s -S -incoming tcp:0:1 "
            "-name a -runas nobody -chroot /j -run-with user=x -add-fd fd=5,set=1 -mem-path /h "
            "-mem-prealloc -overcommit mem-lock=on -object secret,id=s,data=x -loadvm t -snapshot "
            "-object tls-creds-x509,id=t,dir=/x -object filter-dump,id=f,netdev=n,file=/x "
            "-no-shutdown -msg timestamp=on -writeconfig /w -display gtk",
            "",
        ),
    ],
)
def test_each_option_has_its_stand_in(given: str, expected: str) -> None:
    assert made(given) == (expected.split("|") if expected else [])


@pytest.mark.parametrize(
    "given",
    [
        "-device vfio-pci,host=01:00.0",
        "-device vhost-vsock-pci,guest-cid=3",
        "-device vhost-user-blk-pci,chardev=c",
        "-device usb-host,hostbus=1",
        "-device scsi-block,drive=d",
        '-device \'{"driver":"vfio-pci","host":"01:00.0"}\'',
        "-netdev vhost-user,id=n,chardev=c",
        "-netdev vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0",
        "-netdev user,id=n,guestfwd=tcp:10.0.2.9:1-cmd:cat",
        "-net user",
        "-net tap",
        "-tpmdev emulator,id=t,chardev=c",
        "-readconfig /etc/vm.cfg",
        "-set device.x.y=z",
        "-object memory-backend-epc,id=e,size=64M",
        "-object sev-guest,id=s",
        "-object dbus-vmstate,id=d,addr=unix:path=/x",
        "-object unheard-of,id=u",
        "-machine pc,confidential-guest-support=s",
        "-usbdevice host:1.2",
        "-icount shift=auto,rr=record,rrfile=/x",
        "-an-option-of-tomorrow x",
        "-object memory-backend-ram,id=x,size=huge",
    ],
)
def test_what_has_no_stand_in_is_refused(given: str) -> None:
    with pytest.raises(NotSupported):
        made(given)


def test_option_named_like_a_part_of_the_program_is_refused() -> None:
    for name in ("rewritten", "sizes", "memory", "nothing", "wire", "init__", "hubs"):
        with pytest.raises(NotSupported):
            made(f"-{name} x")


def test_memory_of_m_alone_becomes_a_file_of_its_block() -> None:
    options = twin("-M pc -m 64").command.options
    assert [str(o) for o in options[:2]] == ["-M pc", "-m 64"]
    assert json.loads(options[2].value or "") == {
        "qom-type": "memory-backend-file",
        "id": "pc.ram",
        "size": 64 << 20,
        "mem-path": f"/proc/self/fd/{64 << 20}",
        "share": True,
        "x-use-canonical-path-for-ramblock-id": False,
    }
    assert options[3] == Option("machine", "memory-backend=pc.ram")


def test_memory_that_is_not_surely_the_machine_s_is_refused() -> None:
    with pytest.raises(NotSupported, match="machine's main memory"):
        twin("-m 65")


@pytest.mark.parametrize(
    "backend",
    [
        "memory-backend-ram,id=m,size=1G,prealloc=on,policy=bind,host-nodes=0",
        "memory-backend-memfd,id=m,size=1G,share=on,hugetlb=on,hugetlbsize=2M",
        "memory-backend-file,id=m,size=1G,mem-path=/dev/shm/guest,share=on,pmem=on",
        '{"qom-type":"memory-backend-file","id":"m","size":1073741824,"mem-path":"/g",'
        '"readonly":true,"rom":"off","offset":1048576}',
    ],
)
def test_memory_backends_become_sparse_files_that_are_left_out(backend: str) -> None:
    [option] = [
        o
        for o in twin(f"-M pc,memory-backend=m -object {shlex.quote(backend)}").command.options
        if o.name == "object"
    ]
    assert json.loads(option.value or "") == {
        "qom-type": "memory-backend-file",
        "id": "m",
        "size": 1 << 30,
        "mem-path": f"/proc/self/fd/{1 << 30}",
        "share": True,
    }


def test_name_of_a_block_by_its_path_is_kept() -> None:
    given = "memory-backend-memfd,id=m,size=1M,x-use-canonical-path-for-ramblock-id=on"
    options = twin(f"-M pc,memory-backend=m -object {given}").command.options
    assert json.loads(options[1].value or "")["x-use-canonical-path-for-ramblock-id"] is True


def test_taps_are_reported() -> None:
    assert twin("-m 64 -netdev tap,id=n").taps
    assert twin("-m 64 -nic bridge").taps
    assert not twin("-m 64 -netdev user,id=n").taps
