"""Have QEMU write its device state for engine ``direct``, with the guest stopped."""

from __future__ import annotations

import asyncio
from uuid import UUID

from pyqmigrate.errors import QemuError, QemuRefused
from pyqmigrate.io.target import Descriptors
from pyqmigrate.vm.guest.device_state import DeviceState, memory_file, read_devices, read_migrated
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.guest.ramblock import parse_ramblock
from pyqmigrate.vm.guest.run_state import LOADABLE
from pyqmigrate.vm.outgoing.migrate import WhilePaused, migrate
from pyqmigrate.vm.outgoing.timeline import Lane
from pyqmigrate.vm.outgoing.transaction import SaveTransaction
from pyqmigrate.vm.plan.blockers import DeviceStateMethod, devices_with_backends

__all__ = [
    "DeviceStateRefused",
    "check_same_blocks",
    "read_device_sections_of",
    "save_device_sections",
    "save_device_state",
    "try_device_state",
]

_SAVE_DEVICES = "xen-save-devices-state"


class DeviceStateRefused(QemuRefused):
    """QEMU cannot save a device's state. It names the device on its standard error only; a
    migration reports the reason."""


async def save_device_state(
    transaction: SaveTransaction,
    guest: GuestInfo,
    way: DeviceStateMethod,
    while_paused: WhilePaused | None,
) -> DeviceState:
    """Return the device state; the guest is stopped on return.

    ``while_paused`` is called at that instant. Raises QemuError (DeviceStateRefused), and
    NotSupported if QEMU writes something that a snapshot cannot contain.
    """
    with transaction.timeline.phase(Lane.QEMU, "device state"):
        if way is DeviceStateMethod.IGNORE_SHARED:
            return await _migrate_devices(transaction, guest, while_paused)
        return await _save_devices(transaction, guest, while_paused)


async def _migrate_devices(
    transaction: SaveTransaction, guest: GuestInfo, while_paused: WhilePaused | None
) -> DeviceState:
    external = [block.name for block in guest.blocks if block.file_backed]
    with memory_file() as (written, read):
        async with transaction.add_fds({"device-state": written}) as path:
            await migrate(transaction, path, while_paused=while_paused, pause=guest.running)
            transaction.events.mark_stopped()
        return await asyncio.to_thread(read_migrated, Descriptors(read), elsewhere=external)


async def _save_devices(
    transaction: SaveTransaction, guest: GuestInfo, while_paused: WhilePaused | None
) -> DeviceState:
    if guest.running:
        await transaction.stop()
    transaction.events.mark_stopped()
    if while_paused is not None:
        await while_paused()
    with memory_file() as (written, read):
        async with transaction.add_fds({"device-state": written}) as path:
            await save_device_sections(transaction, guest, path)
        return await asyncio.to_thread(read_device_sections_of, guest, read)


async def save_device_sections(transaction: SaveTransaction, guest: GuestInfo, path: str) -> None:
    """Have QEMU write the device state of a stopped guest into ``path``, an fdset.

    Raises DeviceStateRefused.
    """
    try:
        await transaction.monitor.execute(_SAVE_DEVICES, {"filename": path, "live": False})
    except QemuRefused as error:
        raise DeviceStateRefused(_SAVE_DEVICES, _refusal(error, guest)) from error


async def try_device_state(
    transaction: SaveTransaction, guest: GuestInfo, way: DeviceStateMethod
) -> None:
    """Find out whether QEMU can save its device state, before a live save copies all memory.

    QEMU stops a running guest for it by itself, for some milliseconds. The state is not kept. Does
    nothing for other guests, and where a migration writes the state. Raises DeviceStateRefused, and
    QemuError if another client's migration is active.
    """
    if way is not DeviceStateMethod.DEVICES_ONLY or guest.run_state != "running":
        return
    await transaction.check_no_migration()
    with (
        transaction.timeline.phase(Lane.QEMU, "device state, a trial"),
        memory_file() as (written, _),
    ):
        async with transaction.add_fds({"device-state": written}) as path:
            await save_device_sections(transaction, guest, path)


async def check_same_blocks(transaction: SaveTransaction, guest: GuestInfo) -> None:
    """Raise QemuError if QEMU has other RAM blocks than when ``guest`` was inspected.

    While a save copies memory of a running guest, another client can plug a device whose RAM would
    not be in the file, and a restarted guest can have longer firmware tables.
    """
    table = parse_ramblock(await transaction.monitor.hmp("info ramblock"))
    now = {line.name: (line.length, line.host_address) for line in table}
    then = {block.name: (block.length, block.host_address) for block in guest.blocks}
    if now != then:
        names = [name for name in {**then, **now} if now.get(name) != then.get(name)]
        raise QemuError(
            f"RAM block {names[0]!r} was added, removed or resized during the save: a device was "
            "plugged or unplugged, or the guest was restarted; save it again"
        )


def read_device_sections_of(guest: GuestInfo, fd: int) -> DeviceState:
    """Read what :func:`save_device_sections` had written. Raises as
    :func:`~pyqmigrate.vm.guest.device_state.read_devices` does."""
    return read_devices(
        Descriptors(fd),
        machine=guest.machine,
        blocks={block.name: block.length for block in guest.blocks},
        page_size=1 << (guest.target_page_bits or 12),
        uuid=UUID(guest.uuid).bytes if guest.capabilities.get("validate-uuid") else None,
        run_state=guest.run_state if guest.run_state in LOADABLE else "paused",
    )


def _refusal(error: QemuRefused, guest: GuestInfo) -> str:
    suspects = devices_with_backends(guest)
    hint = f" (perhaps {', '.join(suspects)})" if suspects else ""
    return (
        f"{error.desc}; QEMU's standard error, or a save with --engine qemu, names the device whose "
        f"state cannot be saved{hint}"
    )
