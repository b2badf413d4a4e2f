"""Make the command line of a twin: the same machine, without anything of its host.

    twin = make_twin(CommandLine.parse(words), blocks, sizes, memory)
    twin.command.argv()

A twin loads device state and writes it again, and its guest never executes an instruction. It needs
the same devices, without backends: each disk image becomes a ``null-co`` node of the same
size, each RAM backend a sparse file, each character device ``null``, each network backend one that
leads nowhere, and options that listen, log or write are left out. It opens none of the VM's files.

The command line is untrusted: it comes from ``/proc/PID/cmdline``, which a process can change. So
only known options are passed on, and all others are refused with NotSupported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.uri import parse_size
from pyqmigrate.vm.qemu.command_line import (
    CommandLine,
    Option,
    escape,
    join_properties,
    read_ram_size,
)

__all__ = ["Twin", "make_twin"]

Memory = Callable[[int], str]
"""Return the path, for the twin, of a new sparse file of so many bytes."""
Sizes = Callable[[str], int | None]
"""Return the size in bytes of the image with this id, node name or path; None if unknown."""

# Options that shape the machine and are passed on unchanged. Their files are only read.
_KEPT = frozenset(
    {
        "L",
        "accel",
        "acpitable",
        "action",
        "append",
        "bios",
        "boot",
        "cpu",
        "dtb",
        "enable-kvm",
        "fw_cfg",
        "g",
        "global",
        "initrd",
        "kernel",
        "m",
        "no-acpi",
        "no-fd-bootchk",
        "no-hpet",
        "no-user-config",
        "nodefaults",
        "nographic",
        "numa",
        "old-param",
        "option-rom",
        "prom-env",
        "rtc",
        "sandbox",
        "shim",
        "smbios",
        "smp",
        "usb",
        "uuid",
        "vga",
    }
)
# Options for the host, for people, or for what a guest does when it runs.
_DROPPED = frozenset(
    {
        "D",
        "S",
        "add-fd",
        "alt-grab",
        "async-teardown",
        "audio-help",
        "chroot",
        "compat",
        "ctrl-grab",
        "curses",
        "d",
        "daemonize",
        "dfilter",
        "display",
        "echr",
        "enable-fips",
        "enable-sync-profile",
        "full-screen",
        "gdb",
        "incoming",
        "iscsi",
        "jitdump",
        "k",
        "loadvm",
        "mem-path",
        "mem-prealloc",
        "mon",
        "monitor",
        "msg",
        "name",
        "no-quit",
        "no-reboot",
        "no-shutdown",
        "one-insn-per-tb",
        "only-migratable",
        "overcommit",
        "perfmap",
        "pidfile",
        "plugin",
        "portrait",
        "preconfig",
        "qmp",
        "qmp-pretty",
        "qtest",
        "qtest-log",
        "run-with",
        "runas",
        "s",
        "sdl",
        "seed",
        "semihosting",
        "semihosting-config",
        "singlestep",
        "snapshot",
        "spice",
        "trace",
        "tb-size",
        "user",
        "vnc",
        "win2k-hack",
        "writeconfig",
    }
)
# Devices with state in a host device, another process or another machine.
_NO_STAND_IN = re.compile(
    r"vfio-|vhost-|vhost_|virtio-input-host|usb-host|scsi-block|scsi-generic|u2f-passthru|tpm-|"
    r"ivshmem-doorbell|usb-mtp|xen-|ap-|s390-pv|x-remote|x-vfio|virtio-mem|igd-|pci-assign"
)
_USB_DEVICES = frozenset({"braille", "keyboard", "mouse", "tablet", "wacom-tablet"})
# Objects that devices refer to, without a host side or with an unused one.
_KEPT_OBJECTS = frozenset(
    {"can-bus", "cryptodev-backend-builtin", "iothread", "rng-builtin", "throttle-group"}
)
_DROPPED_OBJECTS = re.compile(
    r"authz-|filter-|input-|main-loop|monitor-|secret|thread-context|tls-|colo-compare"
)
_RANDOM = frozenset({"rng-random", "rng-egd"})
# Keys of -drive about the guest's side.
_DRIVE_KEYS = ("if", "index", "bus", "unit", "media", "id", "werror", "rerror")
_READ_ONLY = ("readonly", "read-only")
# Keys of user-mode networking that open nothing on the host.
_USER_KEYS = frozenset(
    {
        "dhcpstart",
        "dns",
        "host",
        "hostname",
        "id",
        "ipv4",
        "ipv6",
        "ipv6-dns",
        "ipv6-host",
        "ipv6-net",
        "ipv6-prefix",
        "ipv6-prefixlen",
        "mac",
        "model",
        "name",
        "net",
        "type",
        "addr",
        "vectors",
    }
)
_NIC_KEYS = frozenset({"addr", "id", "mac", "model", "vectors"})
_TAPS = frozenset({"bridge", "tap"})
# Backends without virtio headers: a hub replaces any of them.
_WIRES = frozenset(
    {"af-xdp", "dgram", "hubport", "l2tpv3", "netmap", "passt", "socket", "stream", "vde"}
)
_IMAGES = {
    "": "index=0,media=disk",
    "hda": "index=0,media=disk",
    "hdb": "index=1,media=disk",
    "hdc": "index=2,media=disk",
    "hdd": "index=3,media=disk",
    "cdrom": "index=2,media=cdrom",
    "fda": "if=floppy,index=0",
    "fdb": "if=floppy,index=1",
    "sd": "if=sd",
    "mtdblock": "if=mtd",
    "pflash": "if=pflash",
}
# What this package adds to the command line of a QEMU that it starts: a pipe, with a monitor.
_OWN_CONFIGURATION = re.compile(r"/proc/self/fd/(\./)?[0-9]+")
_MONITORS_OFF = (Option("display", "none"), Option("monitor", "none"))
_SIZE = 1 << 30  # bytes of an image of unknown size; device state seldom depends on it
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_HUB = 1 << 16  # id of the first hub, above those that users choose


@dataclass(frozen=True)
class Twin:
    """``command`` starts the twin. ``taps``: it makes tap devices, for which it needs a private
    network namespace."""

    command: CommandLine
    taps: bool = False


def make_twin(
    command: CommandLine, blocks: Mapping[str, int], sizes: Sizes, memory: Memory
) -> Twin:
    """Return the twin of the VM that ``command`` started.

    blocks: the length in bytes of every RAM block of the VM, by name.

    Raises NotSupported with the reason if an option has no stand-in.
    """
    rewriter = _Rewriter(sizes, memory)
    options = [twin for option in command.options for twin in rewriter.rewritten(option)]
    if not rewriter.has_backend(command):
        options += _machine_memory(command, blocks, memory)
    options += [*_MONITORS_OFF, Option("S"), Option("incoming", "defer")]
    return Twin(command._replace(options=tuple(options)), rewriter.taps)


class _Rewriter:
    """Replaces the options of a command line."""

    def __init__(self, sizes: Sizes, memory: Memory) -> None:
        self.taps = False
        self._sizes = sizes
        self._memory = memory
        self._hubs = _HUB

    def has_backend(self, command: CommandLine) -> bool:
        """Return whether the command line names the backends of the machine's memory."""
        named = "memory-backend" in command.merged("machine", "type")
        return named or any("memdev" in o.properties("type") for o in command.all("numa"))

    def rewritten(self, option: Option) -> Iterator[Option]:
        """Yield the stand-ins for an option."""
        name = option.name
        if name in _IMAGES:
            yield Option("drive", f"{_IMAGES[name]},{self._nothing(option.value or '')}")
        elif name in self._REWRITTEN:
            yield from self._REWRITTEN[name](self, option)
        elif name in _KEPT:
            yield option
        elif name not in _DROPPED:
            raise NotSupported(f"-{name} may have an effect on the host")

    def _nothing(self, *names: str) -> str:
        """Return the properties of an empty node as large as the image with one of these names."""
        known = (self._sizes(name) for name in names if name)
        size = next((size for size in known if size), _SIZE)
        return f"driver=null-co,size={size},read-zeroes=on"

    def _machine(self, option: Option) -> Iterator[Option]:
        properties = option.properties("type")
        if "confidential-guest-support" in properties or "memory-encryption" in properties:
            raise NotSupported("the memory of a confidential guest has no stand-in")
        dropped = [key for key in properties if key == "dumpdtb"]
        yield _without(option, "type", dropped) if dropped else option

    def _device(self, option: Option) -> Iterator[Option]:
        driver = option.properties("driver").get("driver", "")
        if _NO_STAND_IN.match(driver):
            raise NotSupported(f"device {driver} has state outside QEMU, and no stand-in")
        yield option

    def _icount(self, option: Option) -> Iterator[Option]:
        if "rr" in option.properties("shift"):
            raise NotSupported(f"{option} records or replays the VM in a file")
        yield option

    def _usbdevice(self, option: Option) -> Iterator[Option]:
        if option.value not in _USB_DEVICES:
            raise NotSupported(f"{option} has no stand-in")
        yield option

    def _drive(self, option: Option) -> Iterator[Option]:
        given = option.properties()
        kept = {key: given[key] for key in _DRIVE_KEYS if key in given}
        read_only = next((given[key] for key in _READ_ONLY if key in given), None)
        if read_only is not None:
            kept["readonly"] = read_only
        image = given.get("file") or given.get("file.filename", "")
        text = ",".join(f"{key}={escape(value)}" for key, value in kept.items())
        if not image and "driver" not in given and "file.driver" not in given:
            yield Option("drive", text)  # a drive without a medium
            return
        yield Option("drive", f"{text},{self._nothing(given.get('id', ''), image)}".lstrip(","))

    def _blockdev(self, option: Option) -> Iterator[Option]:
        given = option.properties("driver")
        node = given.get("node-name", "")
        text = self._nothing(node, given.get("filename", ""), given.get("file.filename", ""))
        read_only = f",read-only={given['read-only']}" if "read-only" in given else ""
        yield Option("blockdev", f"{text},node-name={escape(node)}{read_only}")

    def _object(self, option: Option) -> Iterator[Option]:
        given = option.properties("qom-type")
        kind, name = given.get("qom-type", ""), given.get("id", "")
        if kind == "memory-backend-epc":
            raise NotSupported("enclave memory (memory-backend-epc) has no stand-in")
        if kind.startswith("memory-backend-"):
            yield _backend(name, _length(given.get("size", "")), self._memory, given)
        elif kind in _RANDOM:
            yield Option("object", f"rng-builtin,id={escape(name)}")
        elif kind in _KEPT_OBJECTS:
            yield option
        elif not _DROPPED_OBJECTS.match(kind):
            raise NotSupported(f"object {kind} may have an effect on the host")

    def _chardev(self, option: Option) -> Iterator[Option]:
        yield Option("chardev", f"null,id={escape(option.properties('backend').get('id', ''))}")

    def _serial(self, option: Option) -> Iterator[Option]:
        value = option.value or ""
        own = value in ("none", "null") or value.startswith("chardev:")
        yield option if own else Option(option.name, "null")

    def _audiodev(self, option: Option) -> Iterator[Option]:
        yield Option("audiodev", f"none,id={escape(option.properties('driver').get('id', ''))}")

    def _audio(self, option: Option) -> Iterator[Option]:
        given = option.properties("driver")
        yield Option(
            "audio",
            join_properties("none", {key: given[key] for key in ("model", "id") if key in given}),
        )

    def _fsdev(self, option: Option) -> Iterator[Option]:
        yield Option("fsdev", f"synth,id={escape(option.properties('fsdriver').get('id', ''))}")

    def _virtfs(self, option: Option) -> Iterator[Option]:
        given = option.properties("fsdriver")
        yield Option("virtfs", f"synth,mount_tag={escape(given.get('mount_tag', ''))}")

    def _readconfig(self, option: Option) -> Iterator[Option]:
        if not _OWN_CONFIGURATION.fullmatch(option.value or ""):
            raise NotSupported(f"{option} may describe devices, and is not read")
        yield from ()

    def _netdev(self, option: Option) -> Iterator[Option]:
        given = option.properties("type")
        yield Option("netdev", self._wire(given, {"id": given.get("id", "")}))

    def _nic(self, option: Option) -> Iterator[Option]:
        given = option.properties("type")
        if given.get("type") == "none":
            yield option
            return
        yield Option("nic", self._wire(given, {k: v for k, v in given.items() if k in _NIC_KEYS}))

    def _net(self, option: Option) -> Iterator[Option]:
        given = option.properties("type")
        if given.get("type") in ("nic", "none"):
            yield option
            return
        raise NotSupported(f"{option} has no stand-in; give the VM -netdev or -nic")

    def _wire(self, given: Mapping[str, str], kept: Mapping[str, str]) -> str:
        """Return an unconnected network backend that looks the same to the device."""
        kind = given.get("type", "user")
        if kind == "user":
            if "guestfwd" in given:
                raise NotSupported("guestfwd of user-mode networking has its own state")
            inside = {key: value for key, value in given.items() if key in _USER_KEYS - {"type"}}
            return join_properties("user", {**inside, "restrict": "on"})
        if kind in _TAPS:
            self.taps = True
            queues = _queues(given)
            several = {"queues": str(queues)} if queues > 1 else {}
            switches = {"script": "no", "downscript": "no", "vhost": "off"}
            headers = {"vnet_hdr": given["vnet_hdr"]} if "vnet_hdr" in given else {}
            return join_properties("tap", {**kept, **several, **switches, **headers})
        if kind in _WIRES:
            self._hubs += 1
            return join_properties("hubport", {**kept, "hubid": str(self._hubs)})
        raise NotSupported(f"network backend {kind} has no stand-in")

    _REWRITTEN: ClassVar[Mapping[str, Callable[[Any, Option], Iterator[Option]]]] = {
        "audio": _audio,
        "audiodev": _audiodev,
        "blockdev": _blockdev,
        "chardev": _chardev,
        "debugcon": _serial,
        "device": _device,
        "drive": _drive,
        "fsdev": _fsdev,
        "icount": _icount,
        "machine": _machine,
        "net": _net,
        "netdev": _netdev,
        "nic": _nic,
        "object": _object,
        "parallel": _serial,
        "readconfig": _readconfig,
        "serial": _serial,
        "usbdevice": _usbdevice,
        "virtfs": _virtfs,
        "virtioconsole": _serial,
    }


def _queues(given: Mapping[str, str]) -> int:
    if "queues" in given:
        return int(given["queues"]) if given["queues"].isdecimal() else 1
    listed = given.get("fds", "").split(":")
    return len(listed)


def _length(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise NotSupported(f"{text!r} is not the size of a memory backend") from error


def _machine_memory(
    command: CommandLine, blocks: Mapping[str, int], memory: Memory
) -> Iterator[Option]:
    """Yield the backend of the block that the machine makes for ``-m``."""
    size = read_ram_size(command)
    found = [
        name
        for name, length in blocks.items()
        if size in (None, length) and (name == "ram" or name.endswith(".ram")) and "/" not in name
    ]
    if len(found) != 1 or not _ID.fullmatch(found[0]):
        raise NotSupported(f"it is unclear which of {[*blocks]} is the machine's main memory")
    name = found[0]
    yield _backend(name, blocks[name], memory, {"x-use-canonical-path-for-ramblock-id": "off"})
    yield Option("machine", f"memory-backend={name}")


def _backend(name: str, length: int, memory: Memory, given: Mapping[str, str]) -> Option:
    """Return a memory backend that x-ignore-shared leaves out of a stream: a shared, named file."""
    canonical = "x-use-canonical-path-for-ramblock-id"
    properties = {
        "qom-type": "memory-backend-file",
        "id": name,
        "size": length,
        "mem-path": memory(length),
        "share": True,
    } | ({canonical: given[canonical] == "on"} if canonical in given else {})
    return Option("object", json.dumps(properties))


def _without(option: Option, implied: str, keys: list[str]) -> Option:
    kept = {k: v for k, v in option.properties(implied).items() if k not in keys}
    first = kept.pop(implied, None)
    text = join_properties(first, kept) if first else join_properties("", kept).lstrip(",")
    return Option(option.name, text)
