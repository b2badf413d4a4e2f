"""Save, restore and clone the guests of a real QEMU.

    import asyncio
    from pyqmigrate import vm

    async def main() -> None:
        report = await vm.connect("/run/guest.qmp").save("/snap/guest.mapped", then="quit")
        print(report.engine, report.downtime)  # seconds that the guest was stopped
        guest = await vm.restore("/snap/guest.mapped", ["qemu-system-x86_64", "-m", "4G"])
        print(guest.report.load_seconds)

    asyncio.run(main())

:mod:`pyqmigrate.vm.sync` has the same names for programs without asyncio. Both need the library
``qemu.qmp`` (``pip install qemu.qmp``).
"""

from typing import TYPE_CHECKING

from pyqmigrate import lazy_names

if TYPE_CHECKING:
    from pyqmigrate.vm.client import Vm, connect
    from pyqmigrate.vm.incoming.clone import Clone, clone
    from pyqmigrate.vm.incoming.keywords import VmCloneOptions, VmPoolOptions, VmRestoreOptions
    from pyqmigrate.vm.incoming.lazy_state import Damage, LazyState
    from pyqmigrate.vm.incoming.lazy_status import wait_for_memory
    from pyqmigrate.vm.incoming.options import Mode, Push
    from pyqmigrate.vm.incoming.recording import WorkingSetReport
    from pyqmigrate.vm.incoming.report import RestoredVm, RestoreReport
    from pyqmigrate.vm.incoming.restore import restore
    from pyqmigrate.vm.outgoing.options import Then, VmCheckOptions, VmLiveOptions, VmSaveOptions
    from pyqmigrate.vm.outgoing.report import VmSaveReport
    from pyqmigrate.vm.outgoing.timeline import Phase
    from pyqmigrate.vm.plan.check import CheckReport
    from pyqmigrate.vm.plan.engine import Engine
    from pyqmigrate.vm.plan.live_option import Instant, LiveMethod
    from pyqmigrate.vm.pool.guest import PooledGuest
    from pyqmigrate.vm.pool.pool import Pool
    from pyqmigrate.vm.pool.server import PoolServer
    from pyqmigrate.vm.qemu.monitor import Monitor

__all__ = [
    # Save, restore and clone.
    "connect",
    "Vm",
    "restore",
    "RestoredVm",
    "clone",
    "Clone",
    "wait_for_memory",
    # Guests that are ready ahead.
    "Pool",
    "PooledGuest",
    "PoolServer",
    # Reports.
    "VmSaveReport",
    "Phase",
    "RestoreReport",
    "WorkingSetReport",
    "CheckReport",
    "LazyState",
    "Damage",
    # Options.
    "VmSaveOptions",
    "VmCheckOptions",
    "VmLiveOptions",
    "VmRestoreOptions",
    "VmCloneOptions",
    "VmPoolOptions",
    "Engine",
    "LiveMethod",
    "Instant",
    "Then",
    "Mode",
    "Push",
    # QMP.
    "Monitor",
]

# Imported on first use, as in the package above.
_HOME = {
    "CheckReport": "plan.check",
    "Engine": "plan.engine",
    "Instant": "plan.live_option",
    "LiveMethod": "plan.live_option",
    "Clone": "incoming.clone",
    "clone": "incoming.clone",
    "Monitor": "qemu.monitor",
    "Vm": "client",
    "connect": "client",
    "Damage": "incoming.lazy_state",
    "LazyState": "incoming.lazy_state",
    "Mode": "incoming.options",
    "Push": "incoming.options",
    "wait_for_memory": "incoming.lazy_status",
    "VmCloneOptions": "incoming.keywords",
    "VmPoolOptions": "incoming.keywords",
    "VmRestoreOptions": "incoming.keywords",
    "WorkingSetReport": "incoming.recording",
    "RestoredVm": "incoming.report",
    "RestoreReport": "incoming.report",
    "restore": "incoming.restore",
    "Pool": "pool.pool",
    "PooledGuest": "pool.guest",
    "PoolServer": "pool.server",
    "Then": "outgoing.options",
    "VmCheckOptions": "outgoing.options",
    "VmLiveOptions": "outgoing.options",
    "VmSaveOptions": "outgoing.options",
    "VmSaveReport": "outgoing.report",
    "Phase": "outgoing.timeline",
}

__getattr__, __dir__ = lazy_names(__name__, _HOME, globals())
