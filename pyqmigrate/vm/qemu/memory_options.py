"""The options of a command line that make memory."""

from __future__ import annotations

from collections.abc import Iterator

from pyqmigrate.vm.qemu.command_line import CommandLine, Option

__all__ = ["WITHOUT_BACKEND", "memories_of", "memory_backends"]

WITHOUT_BACKEND = ("mem-path", "mem-prealloc")  # options of memory that has no backend

_BACKEND = "memory-backend-"
# Devices whose memory is in a file of its own, or is plugged piece by piece.
_OWN_MEMORY = ("nvdimm", "virtio-pmem", "virtio-mem", "ivshmem")


def memories_of(command: CommandLine, drivers: tuple[str, ...] = _OWN_MEMORY) -> set[str]:
    """Return the ids of backends of devices whose driver starts with one of ``drivers``."""
    devices = (option.properties("driver") for option in command.all("device"))
    return {
        device["memdev"]
        for device in devices
        if "memdev" in device and device.get("driver", "").startswith(drivers)
    }


def memory_backends(command: CommandLine) -> Iterator[tuple[Option, dict[str, str]]]:
    """Generate the options of memory backends, with their properties."""
    for option in command.all("object"):
        properties = option.properties("qom-type")
        if properties.get("qom-type", "").startswith(_BACKEND):
            yield option, properties
