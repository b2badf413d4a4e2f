"""The output of HMP's ``info`` commands, in the layouts of the versions of QEMU."""

from __future__ import annotations

import math

from pyqmigrate.qapi.capabilities import Capabilities
from pyqmigrate.qapi.parameters import Parameters
from pyqmigrate.qapi.qemu_version import QEMU_10_0, QemuVersion
from pyqmigrate.qapi.status import MigrationInfo, RunState, Status

__all__ = ["lines", "render_capabilities", "render_migration", "render_parameters", "render_status"]


def lines(*texts: str) -> str:
    """Return the texts as lines that end with CRLF."""
    return "".join(line.replace("\n", "\r\n") + "\r\n" for line in texts)


_GLOBALS = (
    "store-global-state: on",
    "only-migratable: off",
    "send-configuration: on",
    "send-section-footer: on",
    "send-switchover-start: on",
    "clear-bitmap-shift: 18",
)


def render_migration(
    info: MigrationInfo, qemu: QemuVersion = QEMU_10_0, *, everything: bool = False
) -> str:
    """Return the output of ``info migrate``, or with ``everything`` of ``info migrate -a``."""
    if not qemu.sectioned_info:
        return _plain(info)
    globals_ = lines("Globals:", *(f"  {line}" for line in _GLOBALS)) if everything else ""
    return _sections(info) + globals_


def _plain(info: MigrationInfo) -> str:
    """Return the layout without sections."""
    shown = ["globals:", *_GLOBALS]
    if info.status is Status.NONE:
        return lines(*shown)
    error = f" ({info.error})" if info.error else ""
    shown.append(f"Migration status: {info.status}{error}")
    ram = info.ram if info.status.moving or info.status is Status.COMPLETED else None
    shown.append(f"total time: {info.total_time if ram else 0} ms")
    if ram is None:
        return lines(*shown)
    if info.status is Status.COMPLETED:
        shown.append(f"downtime: {info.downtime} ms")
    else:
        shown.append(f"expected downtime: {info.expected_downtime} ms")
    shown += [
        f"setup: {info.setup_time} ms",
        f"transferred ram: {ram.transferred >> 10} kbytes",
        f"throughput: {ram.mbps:.2f} mbps",
        f"remaining ram: {ram.remaining >> 10} kbytes",
        f"total ram: {ram.total >> 10} kbytes",
        f"duplicate: {ram.duplicate} pages",
        f"normal: {ram.normal} pages",
        f"normal bytes: {ram.normal_bytes >> 10} kbytes",
        f"dirty sync count: {ram.dirty_sync_count}",
        f"page size: {ram.page_size >> 10} kbytes",
        f"multifd bytes: {ram.multifd_bytes >> 10} kbytes",
        f"pages-per-second: {ram.pages_per_second}",
    ]
    if ram.precopy_bytes:
        shown.append(f"precopy ram: {ram.precopy_bytes >> 10} kbytes")
    if ram.downtime_bytes:
        shown.append(f"downtime ram: {ram.downtime_bytes >> 10} kbytes")
    return lines(*shown)


def _sections(info: MigrationInfo) -> str:
    """Return the output of ``info migrate`` in the layout with sections."""
    if info.status is Status.NONE:
        return ""
    error = f" ({info.error})" if info.error and info.status is Status.FAILED else ""
    shown = [f"Status: \t\t{info.status}{error}"]
    ram = info.ram if info.status.moving or info.status is Status.COMPLETED else None
    if ram is None:
        return lines(*shown)
    times = f"total={info.total_time}, setup={info.setup_time}"
    if info.status is Status.COMPLETED:
        shown.append(f"Time (ms): \t\t{times}, down={info.downtime}")
    else:
        shown.append(f"Time (ms): \t\t{times}, exp_down={info.expected_downtime}")
        shown.append(f"Remaining: \t\t{_size(ram.remaining)}")
    others = f"dirty_syncs={ram.dirty_sync_count}"
    if ram.downtime_bytes:
        others += f", downtime_bytes={ram.downtime_bytes}"
    dirty = f", dirty={ram.dirty_pages_rate}" if ram.dirty_pages_rate else ""
    shown += [
        "RAM info:",
        f"  Throughput (Mbps): \t{ram.mbps:.2f}",
        f"  Sizes: \t\tpagesize={_size(ram.page_size)}, total={_size(ram.total)}",
        f"  Transfers: \t\ttransferred={_size(ram.transferred)}, remain={_size(ram.remaining)}",
        f"    Channels: \t\tprecopy={_size(ram.precopy_bytes)}, "
        f"multifd={_size(ram.multifd_bytes)}, postcopy=0 B",
        f"    Page Types: \tnormal={ram.normal}, zero={ram.duplicate}",
        f"  Page Rates (pps): \ttransfer={ram.pages_per_second}{dirty}",
        f"  Others: \t\t{others}",
    ]
    return lines(*shown)


def _size(size: int) -> str:
    """Return three digits, in the unit in which they are below 1000."""
    exponent = max(math.frexp(size * 1.024)[1] - 1, 0) // 10
    unit = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][exponent]
    return f"{size / (1 << 10 * exponent):.3g} {unit}B"


def render_capabilities(capabilities: Capabilities, qemu: QemuVersion = QEMU_10_0) -> str:
    """Return the output of ``info migrate_capabilities``."""
    shown = ((name, state) for name, state in capabilities if qemu.has(name))
    return lines(*(f"{name}: {'on' if state else 'off'}" for name, state in shown))


_SHOWN_PARAMETERS = {
    "announce-initial": "{} ms",
    "announce-max": "{} ms",
    "announce-rounds": "{}",
    "announce-step": "{} ms",
    "throttle-trigger-threshold": "{}",
    "cpu-throttle-initial": "{}",
    "cpu-throttle-increment": "{}",
    "cpu-throttle-tailslow": "{}",
    "max-cpu-throttle": "{}",
    "tls-creds": "'{}'",
    "tls-hostname": "'{}'",
    "max-bandwidth": "{} bytes/second",
    "avail-switchover-bandwidth": "{} bytes/second",
    "downtime-limit": "{} ms",
    "x-checkpoint-delay": "{} ms",
    "multifd-channels": "{}",
    "multifd-compression": "{}",
    "zero-page-detection": "{}",
    "xbzrle-cache-size": "{} bytes",
    "max-postcopy-bandwidth": "{}",
    "tls-authz": "'{}'",
    "x-vcpu-dirty-limit-period": "{} ms",
    "vcpu-dirty-limit": "{} MB/s",
    "mode": "{}",
    "direct-io": "{}",
    "x-rdma-chunk-size": "{} bytes",
    "cpr-exec-command": "",
}
_MOVED = {"tls-authz": "tls-hostname", "max-postcopy-bandwidth": "avail-switchover-bandwidth"}
"""Parameters that the newer layout shows after another one."""


def render_parameters(parameters: Parameters, qemu: QemuVersion = QEMU_10_0) -> str:
    """Return the output of ``info migrate_parameters``."""
    values = dict(parameters)
    names = [name for name in _SHOWN_PARAMETERS if qemu.has(name)]
    layouts = dict(_SHOWN_PARAMETERS)
    if qemu.sectioned_info:
        layouts["max-postcopy-bandwidth"] = "{} bytes/second"
        for name, before in _MOVED.items():
            names.remove(name)
            names.insert(names.index(before) + 1, name)
    shown = []
    for name in names:
        value = values[name]
        if isinstance(value, bool):
            value = "on" if value else "off"
        words = value if isinstance(value, tuple) else [layouts[name].format(value)]
        shown.append(f"{name}:" + "".join(f" {word}" for word in words))
    return lines(*shown)


def render_status(state: RunState) -> str:
    """Return the output of ``info status``."""
    if state is RunState.RUNNING:
        return lines("VM status: running")
    return lines("VM status: paused" + ("" if state is RunState.PAUSED else f" ({state})"))
